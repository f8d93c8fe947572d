"""Options of an upcycling, checked before anything is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from symphony_hf.checkpoints.saving import check_shard_size
from symphony_hf.errors import ConfigError, nearest

ROUTER_INITS = ("normal", "uniform")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of data types in torch -> in safetensors files."""

ALL, EVERY_OTHER = "all", "every-other"


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """Options of an upcycling; see `upcycle`."""

    num_experts: int = 8
    top_k: int = 2
    layers: str | Sequence[int] = ALL
    router_std: float = 0.02
    router_init: str = "normal"
    seed: int = 0
    noise: float = 0.0
    dtype: str | None = None
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        _check_whole("num_experts", self.num_experts, 2)
        _check_whole("top_k", self.top_k, 1)
        _check_whole("seed", self.seed, 0)
        if self.top_k > self.num_experts:
            raise ConfigError(f"upcycle: `top_k` is {self.top_k}, but there are only {self.num_experts} experts")
        _check_number("router_std", self.router_std)
        _check_number("noise", self.noise)
        if self.router_std == 0:
            # With equal logits every token selects the same experts, and these copies get equal gradients forever.
            raise ConfigError(
                "upcycle: `router_std` must be above 0: a router of zeros sends every token to the same experts, and "
                "these, being copies, never become different"
            )
        if self.router_init not in ROUTER_INITS:
            hint = nearest(str(self.router_init), ROUTER_INITS)
            raise ConfigError(f"upcycle: `router_init` is {self.router_init!r}; {hint}")
        check_shard_size(self.max_shard_size, "upcycle")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"upcycle: `dtype` is {self.dtype!r}; {nearest(str(self.dtype), DTYPES)}")

    @property
    def stored_dtype(self) -> str | None:
        """Data type that all weights are cast to, by its name in safetensors files; None to keep their types."""
        return None if self.dtype is None else DTYPES[self.dtype]

    def layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers whose MLPs become experts, in a model with `num_layers` layers.

        Raises:
            ConfigError: If a layer does not exist or is named twice, or none is named.
        """
        if self.layers == ALL:
            return tuple(range(num_layers))
        if self.layers == EVERY_OTHER:
            numbers = tuple(range(1, num_layers, 2))
        elif isinstance(self.layers, str) or not all(_is_whole(layer) for layer in self.layers):
            raise ConfigError(
                f"upcycle: `layers` must be `{ALL}`, `{EVERY_OTHER}` or numbers of layers, got {self.layers!r}"
            )
        else:
            numbers = tuple(sorted(self.layers))
        outside = [number for number in numbers if not 0 <= number < num_layers]
        if outside or not numbers or len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"upcycle: `layers` must name layers of the model, which has 0 to {num_layers - 1}, once each; got "
                f"{self.layers!r}"
            )
        return numbers


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, low: int) -> None:
    if not _is_whole(value) or value < low:
        raise ConfigError(f"upcycle: `{name}` must be a whole number of at least {low}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or value < 0:
        raise ConfigError(f"upcycle: `{name}` must be a number of at least 0, got {value!r}")
