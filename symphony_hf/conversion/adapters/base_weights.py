"""Samples of a base model's weights in an adapter's record, to detect other base models."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.conversion.inspection.tensors import bare_name
from symphony_hf.errors import ConfigError, SymphonyWarning
from symphony_hf.patching.families.probe import full_shape

_SAMPLES = 8
"""Number of values of each weight."""

_ROWS = 64
"""Number of rows that they are taken from: the first ones, which a resized embedding keeps."""

_CHANGED, _UNRELATED = 0.01, 0.5
"""Relative distances: more than rounding to 16 bits makes; more than training a model further makes."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sample_weights(model: nn.Module, routers: Sequence[str]) -> dict[str, list[float]]:
    """Return a few values of the input embedding and of the first and last router, by parameter name.

    Only weights that are in memory as a whole are sampled: not those that are quantized, offloaded or partitioned. The
    model may have adapters.
    """
    if getattr(model, "tp_size", None) is not None:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    wanted = {bare_name(routers[0]), bare_name(routers[-1])}
    with contextlib.suppress(AttributeError, NotImplementedError):  # a model of another kind, or without an embedding
        wanted.add(bare_name(names.get(id(model.get_input_embeddings()), "")))  # type: ignore[operator]
    sampled = {}
    for name, weight in _base_parameters(model):
        if any(name.startswith(f"{module}.") for module in wanted) and name.endswith("weight") and _is_whole(weight):
            values = weight.detach()[:_ROWS].flatten()
            positions = torch.linspace(0, len(values) - 1, _SAMPLES).long().unique().to(values.device)
            sampled[name] = [float(f"{value:.6g}") for value in values[positions].tolist()]
    return sampled


def check_base(stored: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]], where: str) -> None:
    """Compare the sampled weights in an adapter's record with those of the model that the adapter is to be put on.

    Weights that only one of the two has are ignored; records of earlier versions have none. Weights that differ by more
    than rounding give a warning.

    Args:
        stored: The record's.
        own: The model's.
        where: Place of the record, for the messages.

    Raises:
        ConfigError: If the weights are unrelated.
    """
    distance = max(
        (_distance(stored[name], own[name]) for name in stored if len(stored[name]) == len(own.get(name, ()))),
        default=0.0,
    )
    if not distance <= _UNRELATED:
        raise ConfigError(
            f"`{where}`: the adapter was trained on a different base model, with other weights: load that one, or, if "
            "these weights are the ones you mean, delete `base_weights` there"
        )
    if distance > _CHANGED:
        warnings.warn(
            f"`{where}`: the base model's weights differ by {distance:.1%} from those that the adapter was trained "
            "on: load the base model that it was trained on, unless you mean this one",
            SymphonyWarning,
            stacklevel=3,
        )


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Return how far b is from a, relative to the length of a."""
    length = math.hypot(*a)
    return math.dist(a, b) / length if length else 0.0


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (bare name, parameter) of the parameters of the model below its adapters."""
    for name, parameter in model.named_parameters():
        if ".modules_to_save." not in name and ".lora_" not in name:
            yield bare_name(name), parameter


def _is_whole(weight: Any) -> bool:
    return (
        weight.dtype in _DTYPES
        and weight.ndim == 2
        and not weight.is_meta
        and not hasattr(weight, "full_tensor")
        and tuple(weight.shape) == full_shape(weight)
    )
