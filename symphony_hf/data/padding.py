"""Rows of different lengths in one batch, and what is no label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LABEL = -100
"""Of a token that is not learned, by the convention of `torch.nn.CrossEntropyLoss`."""


def pad_rows(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right, where no token of a causal model sees it, whatever side the tokenizer prefers.

    Args:
        rows: Each with `input_ids` and, of the same length, `labels`.
        pad_id: Fills the gaps in `input_ids`.

    Returns:
        `input_ids`, `labels` and `attention_mask`. Shape of each: (rows, longest), int64.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    return {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", NO_LABEL), "attention_mask": mask}


@dataclass(frozen=True)
class PadCollator:
    """`pad_rows` as the Trainer calls it.

    Args:
        pad_id: Fills the gaps in `input_ids`.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """One batch of rows with `input_ids` and `labels`."""
        return pad_rows(rows, self.pad_id)
