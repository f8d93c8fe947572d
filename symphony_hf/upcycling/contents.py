"""The bytes of an upcycled tensor: copied as they are where they can be, else computed a block at a time."""

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import UpcycleError
from .checkpoint import TORCH_DTYPES, Checkpoint, Rows
from .options import UpcycleOptions
from .plan import PARTS, ExpertPart, Piece, PlannedTensor


class Contents:
    """Where the bytes of planned tensors come from.

    Random numbers are NumPy's, of a stream for each router and each expert's projection: they depend neither on the
    other layers nor on the size of a block, and are the same on every machine.

    Args:
        source: The dense checkpoint.
        options: Seed, distribution of the routers' weights, noise.
    """

    def __init__(self, source: Checkpoint, options: UpcycleOptions) -> None:
        self.source = source
        self.options = options
        self._scale = functools.cache(self._root_mean_square)

    def blocks(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        """The bytes of a tensor, a block at a time; each is there until the next is taken."""
        if tensor.router is not None:
            yield _bytes_of(self._router(tensor.router, tensor.shape).to(TORCH_DTYPES[tensor.dtype]))
        elif not tensor.pieces:
            yield _bytes_of(torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype]))
        for piece in tensor.pieces:
            noisy = piece.expert is not None and self.options.noise > 0
            if noisy or tensor.dtype != self.source.tensors[piece.rows.tensor].dtype:
                yield from self._computed(piece, TORCH_DTYPES[tensor.dtype])
            else:
                yield from self.source.blocks(piece.rows)

    def _router(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        stream, std = self._stream(layer), self.options.router_std
        if self.options.router_init == "normal":
            return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)) * std
        # Of the same standard deviation; with 1 / sqrt(3 * width) it is how nn.Linear begins.
        return (2 * torch.from_numpy(stream.random(shape, dtype=np.float32)) - 1) * (math.sqrt(3) * std)

    def _stream(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.options.seed, spawn_key=key))

    def _computed(self, piece: Piece, dtype: torch.dtype) -> Iterator[memoryview]:
        expert = piece.expert if self.options.noise > 0 else None
        stream = self._expert_stream(expert) if expert is not None else None
        for values in self.source.float_blocks(piece.rows):
            changed = values
            if stream is not None:
                drawn = torch.from_numpy(stream.standard_normal(len(values), dtype=np.float32))
                changed = values + drawn * (self.options.noise * self._scale(piece.rows))
            stored = changed.to(dtype)
            if torch.isinf(stored).any() and not torch.isinf(values).any():
                raise UpcycleError(
                    f"upcycle: `{piece.rows.tensor}` has values that {str(dtype).removeprefix('torch.')} cannot hold: "
                    "take `dtype: bfloat16`, or keep the checkpoint's own"
                )
            yield _bytes_of(stored)

    def _expert_stream(self, expert: ExpertPart) -> np.random.Generator:
        return self._stream(expert.layer, 1 + PARTS.index(expert.part), expert.expert)

    def _root_mean_square(self, rows: Rows) -> float:
        """What noise is measured by."""
        squares, count = 0.0, 0
        for values in self.source.float_blocks(rows):
            squares += values.double().square().sum().item()
            count += len(values)
        return math.sqrt(squares / count)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
