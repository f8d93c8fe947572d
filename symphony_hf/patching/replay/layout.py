"""Sequences of a forward's tokens, read from its arguments: padding, packing and a cache are all undone here."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from symphony_hf.errors import PatchError
from symphony_hf.patching.padding import is_padding_mask


class TokenLayout(NamedTuple):
    """The sequence of each token that a forward gets, and its place there.

    Attributes:
        num_sequences: Rows, or the sequences that are packed into them.
        continues: Whether the forward continues the sequences of the last one, whose keys are in a cache.
        sequence_T: Sequence of each token. Shape: (tokens,).
        index_T: Index of each token in its sequence, padding left out; -1 for padding. Shape: (tokens,).
        ids_T: Token ids; None where the forward gets embeddings. Shape: (tokens,).
    """

    num_sequences: int
    continues: bool
    sequence_T: Tensor
    index_T: Tensor
    ids_T: Tensor | None


def read_layout(model: nn.Module, arguments: dict[str, Any]) -> TokenLayout:
    """Read the layout of a forward's tokens.

    Args:
        model: The model, for error messages.
        arguments: The forward's arguments by name.

    Raises:
        PatchError: If it gets neither token ids nor embeddings, or a mask that does not tell padding from packing.
    """
    ids = arguments.get("input_ids")
    embeddings = arguments.get("inputs_embeds")
    tokens = ids if isinstance(ids, Tensor) else embeddings
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise PatchError(
            f"{type(model).__name__} was called without `input_ids` or `inputs_embeds` of shape (rows, positions), so "
            "the tokens that its routers get are not known"
        )
    rows, length = tokens.shape[:2]
    mask = padding_mask(arguments)
    if mask is not None and (len(mask) != rows or mask.shape[1] < length):
        mask = None
    past = max(_num_cached(arguments), 0 if mask is None else mask.shape[1] - length)
    if mask is not None:
        kept_RP = mask.bool()
        index_RP = (kept_RP.cumsum(1) - 1).masked_fill(~kept_RP, -1)[:, -length:]
    else:
        index_RP = (past + torch.arange(length, device=tokens.device)).expand(rows, length)
    sequence_RP = torch.arange(rows, device=tokens.device).unsqueeze(1).expand(rows, length)
    num_sequences, positions = rows, arguments.get("position_ids")
    if not past and isinstance(positions, Tensor) and positions.shape[-1] == length and positions.dim() <= 2:
        starts_RP = (positions.expand(rows, length) == 0) & (index_RP >= 0)
        if bool((starts_RP & (index_RP > 0)).any()):
            _refuse_hidden_padding(model, arguments.get("attention_mask"), length)
            num_sequences, sequence_RP, index_RP = _unpack(starts_RP, index_RP)
    return TokenLayout(
        num_sequences,
        bool(past),
        sequence_RP.reshape(-1),
        index_RP.reshape(-1),
        ids.reshape(-1) if isinstance(ids, Tensor) else None,
    )


def padding_mask(arguments: dict[str, Any]) -> Tensor | None:
    """Return the attention mask, if it says what is padding. Shape: (rows, positions)."""
    mask = arguments.get("attention_mask")
    return mask if is_padding_mask(mask) else None


def _refuse_hidden_padding(model: nn.Module, mask: Any, length: int) -> None:
    """Refuse positions that begin anew, as after padding and in packed rows, with a mask that does not say which."""
    if mask is not None and not is_padding_mask(mask) and _may_hide_padding(mask, length):
        kind = f"attention mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else "attention mask by layer"
        raise PatchError(
            f"{type(model).__name__} was called with an {kind} and with positions that begin anew within a row, so "
            "padding cannot be told from packing: pass the 2-D mask (`generate` makes another for a static cache, so "
            "leave `cache_implementation` out), or rows without padding"
        )


def _may_hide_padding(mask: Any, length: int) -> bool:
    """Whether a mask is of an unknown kind, or no query attends to one of the keys: packed tokens attend to themselves.

    Args:
        mask: Mask of shape (rows, heads, queries, keys), or one for each kind of layer.
        length: Number of positions; keys after them are of a cache that is not full.
    """
    if isinstance(mask, dict):
        return any(_may_hide_padding(value, length) for value in mask.values() if value is not None)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return True
    allowed = mask >= 0 if mask.is_floating_point() else mask.bool()
    return not bool(allowed.any(dim=-2)[..., :length].all())


def _num_cached(arguments: dict[str, Any]) -> int:
    """Return the number of tokens in the cache, whatever this version of the model calls it."""
    return max(
        (int(value.get_seq_length()) for value in arguments.values() if hasattr(value, "get_seq_length")), default=0
    )


def _unpack(starts_RP: Tensor, index_RP: Tensor) -> tuple[int, Tensor, Tensor]:
    """Split rows into the sequences that are packed into them; each begins where its position is 0, or with its row."""
    starts_RP = starts_RP | (index_RP == 0)
    sequence_T = starts_RP.reshape(-1).cumsum(0) - 1
    first_S = index_RP.reshape(-1)[starts_RP.reshape(-1)]
    index_T = index_RP.reshape(-1)
    index_T = torch.where(index_T >= 0, index_T - first_S[sequence_T.clamp_min(0)], index_T)
    return len(first_S), sequence_T.clamp_min(0), index_T
