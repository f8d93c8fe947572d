"""The loss of TRL's SFTTrainer, in size: newer versions project to the vocabulary tile by tile, without all logits."""

from typing import Any

import torch
from torch import Tensor

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""Of TRL's tiles: `TOKEN_CHUNK_SIZE` of `trl.kernels.chunked_logprob`, `_CHUNKED_LOGPROB_CHUNK_SIZE` of
`trl.trainer.utils`."""


def head_is_tiled() -> bool:
    """Whether the installed TRL has such a head; older ones make all logits, as the model's own loss does."""
    import trl.trainer.utils

    return hasattr(trl.trainer.utils, "add_fused_lm_head")


def tiled_loss(hidden_BTD: Tensor, weight_VD: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """A loss that takes the products and the memory of TRL's, on the meta device.

    Args:
        hidden_BTD: What the head is given.
        weight_VD: Of the head.
        compute_dtype: Of the tiles.

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _TiledHead.apply(hidden_BTD.flatten(0, -2), weight_VD, compute_dtype)
    return loss.sum()


class _TiledHead(torch.autograd.Function):
    """Logits are in one tile, and are made again in the backward pass; gradients are summed up in float32."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.dtype = dtype
        tile = _new_tile(hidden_ND, weight_VD, dtype)
        for tokens in hidden_ND.split(TILE_TOKENS):
            for words in weight_VD.split(TILE_VOCABULARY):
                torch.mm(tokens.to(dtype), words.to(dtype).T, out=tile[: len(tokens), : len(words)])
        return hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        hidden_ND, weight_VD = ctx.saved_tensors
        inputs = zip((hidden_ND, weight_VD), ctx.needs_input_grad, strict=False)
        sums = [torch.empty_like(value, dtype=torch.float32) if needed else None for value, needed in inputs]
        # A sum's own memory takes the products: the meta device adds none of another type.
        of_hidden, of_weight = (None if s is None else s.view(ctx.dtype)[:, : s.shape[1]] for s in sums)
        tile = _new_tile(hidden_ND, weight_VD, ctx.dtype)
        for row in range(0, len(hidden_ND), TILE_TOKENS):
            tokens = hidden_ND[row : row + TILE_TOKENS].to(ctx.dtype)
            for column in range(0, len(weight_VD), TILE_VOCABULARY):
                words = weight_VD[column : column + TILE_VOCABULARY].to(ctx.dtype)
                part = tile[: len(tokens), : len(words)]
                torch.mm(tokens, words.T, out=part)
                if of_hidden is not None:
                    torch.mm(part, words, out=of_hidden[row : row + TILE_TOKENS])
                if of_weight is not None:
                    torch.mm(part.T, tokens, out=of_weight[column : column + TILE_VOCABULARY])
        hidden, weight = (None if s is None else s.to(v.dtype) for s, v in zip(sums, ctx.saved_tensors, strict=True))
        return hidden, weight, None


def _new_tile(hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    return hidden_ND.new_empty(min(len(hidden_ND), TILE_TOKENS), min(len(weight_VD), TILE_VOCABULARY), dtype=dtype)
