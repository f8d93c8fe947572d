"""Bytes of an optimizer's states, and of the temporaries of its step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from symphony_hf.errors import ConfigError, nearest


class Weight(NamedTuple):
    """A trained weight: its shape, the bytes of an element, and whether it is that of an `nn.Embedding`."""

    shape: Sequence[int]
    size: int
    is_embedding: bool = False


Weights = Iterable[Weight | tuple[Sequence[int], int]]

_SMALL, _BLOCK = 4096, 256
"""bitsandbytes keeps states with fewer elements in float32, and one float32 scale per block of 8-bit elements."""


def _moments(count: int) -> Callable[[Weight], int]:
    """States of `count` moments in the dtype of the weight, as in torch's optimizers."""
    return lambda weight: count * weight.size * math.prod(weight.shape)


def _float32(count: int) -> Callable[[Weight], int]:
    return lambda weight: count * 4 * math.prod(weight.shape)


def _eight_bit(count: int) -> Callable[[Weight], int]:
    def state(weight: Weight) -> int:
        numel = math.prod(weight.shape)
        in_float32 = numel < _SMALL or weight.is_embedding  # for which Trainer asks bitsandbytes
        return count * (4 * numel if in_float32 else numel + 4 * -(-numel // _BLOCK))

    return state


def _factored(weight: Weight) -> int:
    """States of row and column sums of each matrix; vectors are not factored."""
    shape = weight.shape
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


@dataclass(frozen=True)
class Optimizer:
    """Memory of one optimizer.

    Attributes:
        state: Function of a weight that returns the bytes of its states.
        copies_of_all: Number of copies of all weights that a step makes at once, as torch's `foreach` forms do on a
            GPU.
        temporary_of_largest: Function of the element size that returns the temporary bytes per element of one weight,
            for optimizers that update one weight after another.
    """

    state: Callable[[Weight], int]
    copies_of_all: int = 0
    temporary_of_largest: Callable[[int], int] = lambda size: 0

    def state_bytes(self, weights: Weights) -> int:
        return sum(self.state(Weight(*weight)) for weight in weights)

    def temporary_bytes(self, weights: Weights, on_gpu: bool = True) -> int:
        sizes = [(math.prod(weight.shape), weight.size) for weight in (Weight(*weight) for weight in weights)]
        largest = max((self.temporary_of_largest(size) * numel for numel, size in sizes), default=0)
        copied = [numel * size for numel, size in sizes] if self.copies_of_all else [0]
        # On a CPU, torch updates one weight after another, with at most two copies of it.
        return largest + (self.copies_of_all * sum(copied) if on_gpu else 2 * max(copied, default=0))


_ADAM8, _LION8 = Optimizer(_eight_bit(2)), Optimizer(_eight_bit(1))
_OPTIMIZERS = {
    "adamw_torch": Optimizer(_moments(2), copies_of_all=1),
    "adamw_torch_fused": Optimizer(_moments(2)),
    "adamw_bnb_8bit": _ADAM8,
    "adamw_8bit": _ADAM8,
    "paged_adamw_8bit": _ADAM8,
    "paged_adamw_32bit": Optimizer(_float32(2)),
    "lion_8bit": _LION8,
    "paged_lion_8bit": _LION8,
    "lion_32bit": Optimizer(_float32(1)),
    "paged_lion_32bit": Optimizer(_float32(1)),
    # Two float32 elements per element of the weight; for a 16-bit weight also float32 copies of it and its gradient.
    "adafactor": Optimizer(_factored, temporary_of_largest=lambda size: 8 if size == 4 else 16),
    "sgd": Optimizer(_moments(0)),
    "adagrad": Optimizer(_moments(1), copies_of_all=2),
    "rmsprop": Optimizer(_moments(1), copies_of_all=1),
}
"""Optimizers by their names in TrainingArguments, as Trainer creates them: SGD without momentum, Adafactor without a
first moment. Paged states are counted as GPU memory, where they stay as long as there is room."""


def optimizer_of(name: str) -> Optimizer:
    """Return the optimizer with a name of TrainingArguments, or raise ConfigError if its memory is not known."""
    if name not in _OPTIMIZERS:
        raise ConfigError(
            f"train: the memory of `optim: {name}` is not known, so it cannot be planned; {nearest(name, _OPTIMIZERS)}"
        )
    return _OPTIMIZERS[name]
