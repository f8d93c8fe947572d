"""The 7.4B and the 4.2B model at full size, and tiny ones of the same kind, with seeded random weights."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from symphony_hf.patching.upcycle_modules import upcycle_modules

PHI3_MINI: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
NUM_EXPERTS, TOP_K = 4, 2
# Settings with which Qwen2-MoE computes what Phi-3 with upcycled MLPs does.
UPCYCLED: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
NAMES = ("7.4b", "4.2b")


@dataclass(frozen=True)
class Inputs:
    """Size of one step: sequences, and text tokens in each, without those of an image."""

    micro_batch: int
    text_tokens: int


def config_of(name: str, tiny: bool = False) -> PreTrainedConfig:
    """Return the config of a model in NAMES."""
    text = {**PHI3_MINI, **(TINY if tiny else {})}
    if name == "7.4b":
        return AutoConfig.for_model(**text, **UPCYCLED, moe_intermediate_size=text["intermediate_size"])
    return LlavaConfig(
        text_config={**text, "model_type": "phi3"},
        vision_config={**CLIP_L_336, **(TINY_VISION if tiny else {})},
        image_token_index=text["vocab_size"] - 1,  # never in the random text
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def build(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights on a device, `meta` for shapes only."""
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if vision_of(config) is None else AutoModelForImageTextToText
    with warnings.catch_warnings(), torch.device(device):
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # shared experts of size 0
        model = auto.from_config(config, dtype=dtype)
    if vision_of(config) is not None:
        upcycle_modules(model, ["*multi_modal_projector"], num_experts=NUM_EXPERTS, top_k=TOP_K)
    return model


def vision_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the config of the model's vision tower; None for a text model."""
    return getattr(config, "vision_config", None)


def image_tokens(config: PreTrainedConfig) -> int:
    """Return the number of tokens of a sequence's image."""
    vision = vision_of(config)
    return 0 if vision is None else (vision.image_size // vision.patch_size) ** 2


def random_batch(model: PreTrainedModel, inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """Return random tokens without padding, after an image for a vision-language model, and their labels."""
    config, device = model.config, model.device
    generator = torch.Generator(device).manual_seed(seed)
    shape = inputs.micro_batch, inputs.text_tokens
    limit = getattr(config, "image_token_id", config.get_text_config().vocab_size - 1)
    ids = torch.randint(limit, shape, generator=generator, device=device)
    vision = vision_of(config)
    if vision is None:
        return {"input_ids": ids, "labels": ids}
    image = ids.new_full((inputs.micro_batch, image_tokens(config)), config.image_token_id)
    pixels = (inputs.micro_batch, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": torch.cat([image, ids], dim=1),
        "labels": torch.cat([torch.full_like(image, -100), ids], dim=1),
        "pixel_values": torch.randn(pixels, generator=generator, device=device, dtype=model.dtype),
    }
