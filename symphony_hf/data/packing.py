"""Packing: blocks of several documents that do not attend to each other.

Positions restart at 0 with every document. Without an attention mask and without a key-value cache, transformers
detects packed documents by their positions and masks attention between them; with flash attention, only in batches of
one row. Trainer disables the cache unless `use_cache: true`; a custom training loop must pass `use_cache=False`.
"""

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from symphony_hf.errors import ConfigError, DataError

from .blocks import NO_LABEL, count_blocks
from .token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8
"""Number of tokens of each of the two documents of the check."""

_MAX_CHANGE = 0.05
"""Maximum change of a document's logits with the other document, as a share of the largest logit. Rounding stays far
below it, in bfloat16 too; families that do not separate documents were above 0.3."""


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Dataset of blocks cut from concatenated documents, for the Trainer. The model shifts the labels.

    There is no attention mask because there is no padding. Tokens that do not fill a last block are dropped. With
    `packing`, each document, or the part of it in the block, attends only to itself; its first token is then not in the
    loss, since nothing precedes it. Too few tokens for one block raise DataError, which begins with `where`.
    """

    def __init__(self, store: TokenStore, block_size: int, packing: bool = False, where: str = "") -> None:
        self.store = store
        self.block_size = block_size
        self.packing = packing
        self.num_blocks = count_blocks(len(store.starts) - 1, len(store), block_size, where)

    def __len__(self) -> int:
        """Number of blocks."""
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and, when packing, `position_ids`. Shape of each: (block_size,), int64."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        start = index * self.block_size
        tokens = self.store.slice(start, start + self.block_size)
        if not self.packing:
            return make_block(tokens)
        first, last = np.searchsorted(self.store.starts, [start, start + self.block_size])
        return make_block(tokens, self.store.starts[first:last] - start)


def make_block(tokens: np.ndarray, starts: np.ndarray | None = None) -> dict[str, Tensor]:
    """Build the Trainer's inputs for one block: `input_ids` and `labels`. Shape of each: (block_size,).

    `starts` are ascending indices at which documents begin, for documents that attend only to themselves. Tokens before
    the first are the end of another document. First tokens are then not in the loss, and `position_ids` restart at 0.
    """
    labels = tokens.copy()
    if starts is None:
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
    labels[starts] = NO_LABEL
    begins = np.zeros(len(tokens), dtype=np.int64)
    begins[starts] = starts
    positions = np.arange(len(tokens)) - np.maximum.accumulate(begins)
    arrays = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_packed_batches(attention: str | None, **rows: int) -> None:
    """Refuse flash attention for batches of several packed rows, in which it would not keep documents apart.

    Args:
        attention: The model's `attn_implementation`, if one was chosen.
        **rows: Number of rows of each kind of batch, by the setting that it is from.

    Raises:
        ConfigError: If there are several.
    """
    several = [f"`{name}: {number}`" for name, number in rows.items() if number > 1]
    if several and "flash" in (attention or ""):
        raise ConfigError(
            f"data: packing: attention `{attention}` keeps documents apart only in batches of one row, got "
            f"{' and '.join(several)}: set 1, with more `gradient_accumulation_steps`, or `model.attention: sdpa`"
        )


@torch.no_grad()
def check_packing(model: "PreTrainedModel", attention: str | None = None, rows: int = 2) -> None:
    """Refuse a model whose packed documents influence each other.

    Recurrent layers ignore positions, and so does the attention of some families; no setting says which. So the check
    runs the model on two documents: the logits of the second must not change with the first.

    Args:
        model: Model to train, or a small one of its family with random weights.
        attention: The model's `attn_implementation`, if one was chosen. On the CPU, where kernels such as flash
            attention do not run, `eager` takes its place during the check.
        rows: Number of rows of a batch; some kernels keep documents apart only in batches of one.

    Raises:
        DataError: If the logits change, or the model takes no positions.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise DataError(
            f"data: packing: {name} takes no `position_ids`, which keep packed documents apart: set `packing: false`"
        )
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    second, *firsts = torch.randint(vocab_size, (3, _PROBE), generator=generator)
    positions = torch.arange(_PROBE).repeat(2).expand(rows, -1).to(model.device)
    was_training = model.training
    chosen = attention if model.device.type == "cpu" else None
    model.eval()
    if chosen is not None:
        model.set_attn_implementation("eager")
    try:
        one, other = (
            model(
                input_ids=torch.cat([first, second]).expand(rows, -1).to(model.device),
                position_ids=positions,
                use_cache=False,
            ).logits[0, _PROBE:]
            for first in firsts
        )
    finally:
        model.train(was_training)
        if chosen is not None:
            model.set_attn_implementation(chosen)
    difference = float((one - other).abs().max() / one.abs().max())
    if not difference <= _MAX_CHANGE:
        raise DataError(
            f"data: packing: {name} lets documents in one sequence influence each other, or has no finite logits "
            f"(those of one change by {difference:.1%} with the other): set `packing: false`"
        )
