"""Blocks of several documents, each of which attends to itself alone.

Positions begin at 0 with every document. Without an attention mask, and without a cache of keys, transformers takes
that for the sign of packed documents, and masks attention between them. Trainers keep no cache; a loop of one's own
must pass `use_cache=False`.
"""

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from symphony_hf.errors import DataError

from .blocks import NO_LABEL, count_blocks
from .token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8
"""Tokens of each of the two documents that a model is tried with."""

_HEARD = 0.05
"""Of the largest logit. Rounding stays far below it, in bfloat16 too; families that let documents hear each other were
above 0.3."""


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Documents one after the other, cut into blocks, as the Trainer takes them: the model shifts the labels.

    There is no attention mask, because nothing is padded. The tokens that do not fill a last block are dropped.

    Args:
        store: The documents' tokens.
        block_size: Tokens in a block.
        packing: Whether each document (or the part of one that is in the block) attends to itself alone. Its first
            token is then no label, since nothing before it tells it.

    Raises:
        DataError: If there are too few tokens for one block.
    """

    def __init__(self, store: TokenStore, block_size: int, packing: bool = False) -> None:
        self.store = store
        self.block_size = block_size
        self.packing = packing
        self.num_blocks = count_blocks(len(store.starts) - 1, len(store), block_size)

    def __len__(self) -> int:
        """Number of blocks."""
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and, when packing, `position_ids`. Shape of each: (block_size,), int64."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        start = index * self.block_size
        tokens = self.store.slice(start, start + self.block_size)
        if not self.packing:
            return make_block(tokens)
        first, last = np.searchsorted(self.store.starts, [start, start + self.block_size])
        return make_block(tokens, self.store.starts[first:last] - start)


def make_block(tokens: np.ndarray, starts: np.ndarray | None = None) -> dict[str, Tensor]:
    """What the Trainer takes of one block.

    Args:
        tokens: Of the block, int64. Shape: (block_size,).
        starts: Where documents begin in it, ascending, each of which is to attend to itself alone; what is before the
            first is the end of another. None where all attend to all before them.

    Returns:
        `input_ids` and `labels`; with `starts`, the documents' first tokens are no labels, and there are
        `position_ids`, which begin at 0 with each. Shape of each: (block_size,).
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


@torch.no_grad()
def check_packing(model: "PreTrainedModel") -> None:
    """Refuse a model whose packed documents hear one another.

    Recurrent layers do not look at positions, and some families' attention does not either; no setting says which. So
    the model is run: the second of two documents must not change with the first.

    Args:
        model: The one to train, or a small one of its family with random weights.

    Raises:
        DataError: If it changes, or the model takes no positions.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise DataError(f"data: packing: {name} takes no positions, by which packed documents are told apart")
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    second, *firsts = torch.randint(vocab_size, (3, _PROBE), generator=generator)
    positions = torch.arange(_PROBE).repeat(2).unsqueeze(0).to(model.device)
    was_training = model.training
    model.eval()
    try:
        one, other = (
            model(
                input_ids=torch.cat([first, second]).unsqueeze(0).to(model.device),
                position_ids=positions,
                use_cache=False,
            ).logits[0, _PROBE:]
            for first in firsts
        )
    finally:
        model.train(was_training)
    difference = float((one - other).abs().max() / one.abs().max())
    if difference > _HEARD:
        raise DataError(
            f"data: packing: {name} lets documents in one sequence hear each other (the logits of one change by "
            f"{difference:.1%} with another): set `packing: false`"
        )
