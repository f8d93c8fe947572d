"""LLaVA out of two checkpoints: a language model, a vision tower, and a new projector between them."""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from symphony_hf.errors import ConfigError


def vision_config_of(path: str) -> PreTrainedConfig:
    """The config of a checkpoint's vision tower: its own, or that of the half of CLIP or SigLIP that sees.

    Raises:
        ConfigError: If it has none.
    """
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ConfigError(f"model: vision: `{path}` has no vision tower ({config.model_type})")
    return config


def llava_config(text: PreTrainedConfig, vision: PreTrainedConfig, image_token_id: int) -> LlavaConfig:
    """LLaVA's own settings: the features before the vision tower's last layer, its class token left out."""
    return LlavaConfig(text_config=text, vision_config=vision, image_token_id=image_token_id)


def build_llava(
    text_path: str,
    vision_path: str,
    image_token_id: int,
    *,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    text_revision: str | None = None,
) -> LlavaForConditionalGeneration:
    """Put a language model and a vision tower together, with a projector that has learned nothing yet.

    Neither is copied: the model is built empty, and the two are put into it.

    Args:
        text_path: A causal language model's checkpoint.
        vision_path: A vision tower's, or CLIP's or SigLIP's.
        image_token_id: The token that stands for an image. If the vocabulary has no room for it, it is enlarged.
        dtype: Of all weights; `auto` for the language model's own.
        seed: Of the projector's weights, drawn from N(0, 0.02).
        text_revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: If the second checkpoint has no vision tower.
    """
    vision_config = vision_config_of(vision_path)
    text = AutoModelForCausalLM.from_pretrained(text_path, revision=text_revision, dtype=dtype)
    with torch.device("meta"):
        vision_class = type(AutoModel.from_config(vision_config))
        config = llava_config(text.config, vision_config, image_token_id)
        model = LlavaForConditionalGeneration._from_config(config, dtype=text.dtype)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    model.model.vision_tower = vision_class.from_pretrained(vision_path, dtype=text.dtype)
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
