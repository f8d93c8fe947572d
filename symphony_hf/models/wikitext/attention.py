"""Attention over a fixed span of earlier positions, in the block and in the memory before it.

Shapes: B rows, H heads, M positions of the block, S span, N positions of memory (at most S) and block, D head size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .configuration import WikiTextMoeConfig


class SpanAttention(nn.Module):
    """Each position attends to the S positions before it, and not to itself, by their content and their distance.

    What lies before the beginning of a stream is zeros, which are attended to, too: their keys and values are zero,
    so they take weight by their distance alone, and give nothing. So there is no mask, the first position has
    something to attend to, and padding is the same as nothing, once its hidden states are zero.

    Source: adaptive-span (arXiv 1905.07799) with its span fixed, as MomentumSMoE's code base has it.
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
        """Attend.

        Args:
            hidden: Of the block. Shape: (B, M, hidden_size).
            distance_keys_SD: A key for each distance, from S down to 1, shared by all heads and blocks.
            states: Hidden states of the positions before the block, which keys and values are made of anew, so that
                the projections learn from them. Shape: (B, up to S, hidden_size).
            cache: Keys and values of the positions before the block, which the block's are added to.

        Returns:
            Shape: (B, M, hidden_size).
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
    """Softmax attention of each query over the S positions before its own.

    Args:
        queries: Shape: (B, H, M, D).
        keys: Of the positions up to the block's last; where they are fewer than S + M, zeros go before them.
            Shape: (B, H, N, D).
        values: Same shape.
        distance_keys_SD: Key of distance S first, of distance 1 last. Shape: (S, D).
        dropout: Of the attention weights.

    Returns:
        Shape: (B, H, M, D).
    """
    span, length = distance_keys_SD.shape[0], queries.shape[2]
    missing = span + length - keys.shape[2]
    keys, values = (F.pad(part, (0, 0, missing, 0)) for part in (keys, values))  # crops where it is negative
    queries = queries * queries.shape[-1] ** -0.5
    by_content = _band(queries @ keys.transpose(-1, -2), span)
    weights = (by_content + queries @ distance_keys_SD.to(queries.dtype).T).softmax(-1, dtype=torch.float32)
    weights = F.dropout(weights.to(values.dtype), dropout)
    in_place = weights.new_zeros(*weights.shape[:-1], span + length)
    _band(in_place, span).copy_(weights)
    return in_place @ values


def _band(scores: Tensor, span: int) -> Tensor:
    """Of row m the columns m to m + span - 1, as a view: each row begins one column after the row above.

    Args:
        scores: Contiguous. Shape: (B, H, M, S + M).
        span: S.

    Returns:
        Shape: (B, H, M, S).
    """
    *outer, row, column = scores.stride()
    return scores.as_strided((*scores.shape[:-1], span), (*outer, row + column, column), scores.storage_offset())


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
