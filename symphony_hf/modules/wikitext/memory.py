"""What a model remembers of the streams that its batches are blocks of."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache


class StreamMemory:
    """The last hidden states that went into each attention, for the next block of the same streams.

    For training, where the next block's keys and values are made of them with the weights of then. They are detached:
    gradients end at the block. Without gradients a Cache of transformers does, which keeps the keys and values.

    Args:
        span: Positions that are kept.
        num_layers: Attentions.

    Attributes:
        states: By layer; None before the first block. Shape: (rows, up to span, hidden_size).
    """

    def __init__(self, span: int, num_layers: int) -> None:
        self.span = span
        self.states: list[Tensor | None] = [None] * num_layers

    def push(self, layer_idx: int, hidden: Tensor) -> Tensor | None:
        """Keep a block's hidden states, and hand out what was kept before it.

        Args:
            layer_idx: Of the attention that they go into.
            hidden: Shape: (rows, length, hidden_size).

        Returns:
            Shape: (rows, up to span, hidden_size); None where nothing was kept.
        """
        before, now = self.states[layer_idx], hidden.detach()
        joined = now if before is None else torch.cat([before, now], dim=1)
        self.states[layer_idx] = joined[:, -self.span :]
        return before


def forget(memory: StreamMemory | Cache, continues_B: Tensor) -> None:
    """Empty the rows of a memory that begin another stream. Zeros are what was before a stream.

    Args:
        memory: With one row a stream.
        continues_B: False for each row that begins anew. Shape: (rows,), bool.
    """
    if isinstance(memory, StreamMemory):
        memory.states = [None if kept is None else _keep(kept, continues_B) for kept in memory.states]
        return
    for layer in _filled_layers(memory):
        layer.keys, layer.values = _keep(layer.keys, continues_B), _keep(layer.values, continues_B)


def _filled_layers(cache: Cache) -> "Iterator":
    return (layer for layer in cache.layers if layer.get_seq_length() > 0)


def _keep(kept: Tensor, continues_B: Tensor) -> Tensor:
    keep = continues_B.to(kept.device).view(-1, *[1] * (kept.dim() - 1))
    return torch.where(keep, kept, 0.0)
