"""Small batches of text or of text and images, as the forward of a tiny model takes them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .overrides import NO_LOSS

_FIRST_TEXT_ID, _LAST_TEXT_ID = 3, 95  # between the end of a text and the placeholders of images
_TEXT_BEFORE, _TEXT_AFTER = 2, 6
_PATCHES_A_SIDE = 12  # of an image: a multiple of every family's merging or pooling, two or three a side
_TOWER_SETTINGS = ("vision_feature_select_strategy",)
_NO_LABEL = -100


def tiny_batch(model: PreTrainedModel, *, rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Draw a batch of text with labels, for `model(**batch)`."""
    generator = torch.Generator().manual_seed(seed)
    ids = _draw_text(rows, length, generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        labels = _draw_text(rows, length, generator)
        return batch | {"decoder_input_ids": labels.roll(1, dims=1), "labels": labels}
    if "TokenClassification" in type(model).__name__:
        return batch | {"labels": torch.randint(model.config.num_labels, (rows, length), generator=generator)}
    return batch | _draw_targets(model, ids, generator)


def tiny_images(model: PreTrainedModel, *, rows: int = 2, seed: int = 0) -> dict[str, Tensor] | None:
    """Draw a batch with an image and text in each row, and labels for the text; None for a text-only family."""
    config = model.config
    if getattr(config, "vision_config", None) is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    arguments = _arguments(model)
    pixels = _draw_pixels(config, arguments, rows, generator)
    placeholders = [config.image_token_id] * _count_image_tokens(model, pixels, rows)
    image = torch.tensor([*_marker(config, "start"), *placeholders, *_marker(config, "end")])
    text = _draw_text(rows, _TEXT_BEFORE + _TEXT_AFTER, generator)
    ids = torch.cat([text[:, :_TEXT_BEFORE], image.expand(rows, -1), text[:, _TEXT_BEFORE:]], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in arguments:
            batch[name] = (ids == config.image_token_id).long()
    return batch | _draw_targets(model, ids, generator)


def _draw_text(rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(_FIRST_TEXT_ID, _LAST_TEXT_ID + 1, (rows, length), generator=generator)


def _draw_targets(model: PreTrainedModel, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the labels of a language model, or a seeded canvas for a diffusion model."""
    if model.config.model_type in NO_LOSS:
        return {"decoder_input_ids": _draw_text(len(ids), model.config.canvas_length, generator)}
    return {"labels": ids.masked_fill(ids > _LAST_TEXT_ID, _NO_LABEL)}


def _arguments(model: PreTrainedModel) -> set[str]:
    """Return the names of the forward's arguments, with those that it passes on to the models inside."""
    inside = model.base_model
    parts = (model, inside, getattr(inside, "encoder", inside))
    return {name for part in parts for name in inspect.signature(part.forward).parameters}


def _draw_pixels(
    config: PretrainedConfig, arguments: set[str], rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw noise as pixels, in the form that the family's processor returns."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vision, side = config.vision_config, _PATCHES_A_SIDE
    if config.model_type in _OWN_PIXELS:
        return _OWN_PIXELS[config.model_type](vision, rows, noise)
    patch = vision.sam_config.patch_size if hasattr(vision, "sam_config") else vision.patch_size
    if "image_grid_thw" in arguments:
        frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
        grid = torch.tensor([[1, side, side]] * rows)
        return {"pixel_values": noise(rows * side**2, frames * 3 * patch**2), "image_grid_thw": grid}
    if "image_position_ids" in arguments:
        positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(rows, -1, -1)
        return {"pixel_values": noise(rows, side**2, 3 * patch**2).sigmoid(), "image_position_ids": positions}
    size = side * patch
    pixels = {"pixel_values": noise(rows, 3, size, size)}
    return pixels | ({"image_sizes": torch.tensor([[size, size]] * rows)} if "image_sizes" in arguments else {})


def _inkling_pixels(vision: PretrainedConfig, rows: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Draw four blocks of frames and pixels per image, each a token."""
    return {"pixel_values": noise(rows * 4, vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3)}


def _inkling2_pixels(vision: PretrainedConfig, rows: int, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Draw four blocks of pixels per image, each a token; the grid counts blocks, not patches."""
    side = vision.patch_size * vision.spatial_merge_size
    return {"pixel_values": noise(rows * 4, side, side, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * rows)}


_OWN_PIXELS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "inkling_mm_model": _inkling_pixels,
    "inkling2": _inkling2_pixels,
    "inkling2_loop": _inkling2_pixels,
}


@torch.no_grad()
def _count_image_tokens(model: PreTrainedModel, pixels: dict[str, Tensor], rows: int) -> int:
    """Return the number of tokens that the vision tower makes of an image."""
    parts = (model, model.base_model, getattr(model.base_model, "encoder", None))
    owner: Any = next(part for part in parts if hasattr(part, "get_image_features"))
    parameters = inspect.signature(owner.get_image_features).parameters
    # Older releases have a setting of the vision tower passed in.
    settings = {name: getattr(model.config.vision_config, name) for name in parameters if name in _TOWER_SETTINGS}
    features = owner.get_image_features(**pixels, **settings)
    if isinstance(features, ModelOutput):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    if isinstance(features, (list, tuple)):
        return sum(len(feature) for feature in features) // rows
    return features.numel() // features.shape[-1] // rows


def _marker(config: PretrainedConfig, side: str) -> list[int]:
    """Return the token at the start or the end of an image, if the family has one."""
    short = {"start": "boi", "end": "eoi"}[side]
    names = (f"vision_{side}_token_id", f"image_{side}_token_id", f"{short}_token_id", f"{short}_token_index")
    return [getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)][:1]
