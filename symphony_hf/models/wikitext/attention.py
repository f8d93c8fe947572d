"""Attention over a fixed span of earlier positions, in the current block and in memory.

Shapes: B rows, H heads, M positions of the block, S span, N positions of memory (at most S) and block, D head size.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .configuration import WikiTextMoeConfig


class SpanAttention(nn.Module):
    """Attention of each position to the S positions before it, not to itself, by content and distance.

    Positions before the start of a stream are zeros and are attended to as well: their keys and values are zero, so
    they get weight by their distance alone and contribute nothing. No mask is needed, the first position has something
    to attend to, and padding has no effect once its hidden states are zero.

    Source: adaptive-span (arXiv 1905.07799) with a fixed span, as in MomentumSMoE's code base.
    """

    def __init__(self, config: WikiTextMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self, hidden: Tensor, distance_keys_SD: Tensor, states: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Compute the attention output. Shape: (B, M, hidden_size).

        Args:
            hidden: Hidden states of the block. Same shape.
            distance_keys_SD: Key of each distance, from S down to 1, shared by all heads and blocks.
            states: Hidden states before the block, from which keys and values are recomputed so that the projections
                learn from them. Shape: (B, up to S, hidden_size).
            cache: Keys and values before the block; those of the block are added.
        """
        context = hidden if states is None else torch.cat([states, hidden], dim=1)
        queries, keys, values = (
            projection(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, inputs in ((self.q_proj, hidden), (self.k_proj, context), (self.v_proj, context))
        )
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        dropout = self.dropout if self.training else 0.0
        outputs = attend_to_span(queries, keys, values, distance_keys_SD, dropout)
        return self.o_proj(outputs.transpose(1, 2).flatten(2))


def attend_to_span(
    queries: Tensor, keys: Tensor, values: Tensor, distance_keys_SD: Tensor, dropout: float = 0.0
) -> Tensor:
    """Compute softmax attention of each query over the S positions before its own. Shape: (B, H, M, D).

    Args:
        queries: Same shape.
        keys: Keys up to the block's last position, padded with zeros in front to S + M. Shape: (B, H, N, D).
        values: Shape: (B, H, N, D).
        distance_keys_SD: Keys of the distances, from S down to 1.
        dropout: Dropout on the attention weights.
    """
    span, length = distance_keys_SD.shape[0], queries.shape[2]
    # Chunks of up to S queries, each with the keys that any of its queries attends to: of the product of all queries
    # and all keys, only a band is used.
    chunk = min(span, length)
    filled = math.ceil(length / chunk) * chunk
    missing = span + length - keys.shape[2]
    keys, values = (_windows(F.pad(part, (0, 0, missing, filled - length)), span, chunk) for part in (keys, values))
    queries = F.pad(queries * queries.shape[-1] ** -0.5, (0, 0, 0, filled - length)).unflatten(2, (-1, chunk))
    by_content = _band(queries @ keys.transpose(-1, -2), span)
    weights = (by_content + queries @ distance_keys_SD.to(queries.dtype).T).softmax(-1, dtype=torch.float32)
    weights = F.dropout(weights.to(values.dtype), dropout)
    in_place = weights.new_zeros(*weights.shape[:-1], span + chunk)
    _band(in_place, span).copy_(weights)
    return (in_place @ values).flatten(2, 3)[:, :, :length]


def _windows(padded: Tensor, span: int, chunk: int) -> Tensor:
    """Return the span before each chunk and the chunk itself. Shape: (B, H, chunks, span + chunk, D)."""
    if chunk < span:
        return padded.unsqueeze(2)  # the only chunk
    parts = padded.unflatten(2, (-1, span))
    return torch.cat([parts[:, :, :-1], parts[:, :, 1:]], dim=3)  # `unfold` has a slower backward


def _band(scores: Tensor, span: int) -> Tensor:
    """Return columns m to m + span - 1 of each row m of contiguous scores, (..., M, S + M): a view, (..., M, S)."""
    *outer, row, column = scores.stride()
    return scores.as_strided((*scores.shape[:-1], span), (*outer, row + column, column), scores.storage_offset())


class StreamMemory:
    """Last inputs of each attention layer, for the next block of the same streams in training.

    The next block computes keys and values from them with its current weights. They are detached, so gradients end at
    the block. Without gradients, transformers' Cache is used instead, which stores keys and values. `states` has them
    by layer, None before the first block. Shape: (rows, up to span, hidden_size).
    """

    def __init__(self, span: int, num_layers: int) -> None:
        self.span = span
        self.states: list[Tensor | None] = [None] * num_layers

    def push(self, layer_idx: int, hidden: Tensor) -> Tensor | None:
        """Store a layer's hidden states, and return those stored before. Shape: (rows, up to span, hidden_size)."""
        before, now = self.states[layer_idx], hidden.detach()
        joined = now if before is None else torch.cat([before, now], dim=1)
        self.states[layer_idx] = joined[:, -self.span :]
        return before


def forget(memory: StreamMemory | Cache, continues_B: Tensor) -> None:
    """Zero the rows of a memory that start another stream, for which `continues_B` is False."""
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
