"""LLaVA from two checkpoints: a language model, a vision tower, and a new projector."""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from symphony_hf.errors import ConfigError

_AFTER_LAYERS = {"post_layernorm", "layernorm", "head", "pooler"}
"""Modules after a vision tower's layers, in CLIP, SigLIP, ViT and DINOv2."""


def vision_config_of(path: str) -> PreTrainedConfig:
    """Return the config of a checkpoint's vision tower, which may be part of CLIP or SigLIP.

    Raises:
        ConfigError: If there is none.
    """
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ConfigError(f"model: vision: `{path}` has no vision tower ({config.model_type})")
    return config


def has_class_token(vision: PreTrainedConfig) -> bool:
    """Return whether the first feature of a vision tower is of no patch: CLIP has such a class token, SigLIP none."""
    with torch.device("meta"):
        tower = AutoModel.from_config(vision)
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())


def is_after_layers(name: str) -> bool:
    """Whether a parameter of a vision tower is of its last norm or its pooling, which LLaVA's features do not pass.

    Args:
        name: Its name in the tower.
    """
    return name.removeprefix("vision_model.").partition(".")[0] in _AFTER_LAYERS


def select_strategy(vision: PreTrainedConfig) -> str:
    """Return LLaVA's `vision_feature_select_strategy` that leaves a vision tower's patches."""
    return "default" if has_class_token(vision) else "full"


def llava_config(text: PreTrainedConfig, vision: PreTrainedConfig, image_token_id: int) -> LlavaConfig:
    """Return LLaVA's usual config: features before the vision tower's last layer, without the class token.

    Raises:
        ConfigError: If the language model is a Symphony model.
    """
    if getattr(text, "symphony", None) is not None:
        raise ConfigError(
            f"model: path: `{text.name_or_path}` is a Symphony checkpoint, and a LLaVA is built from a plain language "
            f"model: fold it; or give its plain base, and `symphony.graph: {text.name_or_path}`"
        )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token_id,
        vision_feature_select_strategy=select_strategy(vision),
    )


def build_llava(
    text_path: str,
    vision_path: str,
    image_token_id: int,
    *,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    text_revision: str | None = None,
) -> LlavaForConditionalGeneration:
    """Combine a language model and a vision tower with a new projector, without copying either.

    Args:
        text_path: Checkpoint of a causal language model.
        vision_path: Checkpoint of a vision tower, CLIP or SigLIP.
        image_token_id: Id of the image token. The vocabulary is enlarged if necessary.
        dtype: Data type of all weights; `auto` for that of the language model.
        seed: Seed of the projector's weights, drawn from N(0, 0.02).
        text_revision: Branch, tag or commit of the language model on the Hub.

    Raises:
        ConfigError: If the first is a Symphony checkpoint, or the second has no vision tower or lacks weights that
            LLaVA uses.
    """
    vision_config = vision_config_of(vision_path)
    text_config = AutoConfig.from_pretrained(text_path, revision=text_revision)
    config = llava_config(text_config, vision_config, image_token_id)  # refuses before the weights are loaded
    text = AutoModelForCausalLM.from_pretrained(text_path, revision=text_revision, dtype=dtype)
    config.text_config = text.config
    with torch.device("meta"):
        vision_class = type(AutoModel.from_config(vision_config))
        model = LlavaForConditionalGeneration._from_config(config, dtype=text.dtype)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    model.model.vision_tower = _load_tower(vision_class, vision_path, text.dtype)
    projector = model.model.multi_modal_projector.to_empty(device=text.device)
    generator = torch.Generator().manual_seed(seed)
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                weight = 0.02 * torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.zero_()
    model.generation_config = text.generation_config
    if image_token_id >= text.config.vocab_size:
        model.resize_token_embeddings(image_token_id + 1, pad_to_multiple_of=64)
    return model


def _load_tower(vision_class: type[PreTrainedModel], path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load all of a vision tower that LLaVA uses: transformers would leave missing weights random."""
    tower, info = vision_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in info["missing_keys"] if not is_after_layers(name))
    if missing:
        raise ConfigError(
            f"model: vision: `{path}` lacks {len(missing)} weights of {vision_class.__name__} ({missing[0]}, ...): "
            "give a checkpoint with a whole vision tower"
        )
    return tower
