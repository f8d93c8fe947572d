"""Padded batches of token windows, and a context manager for eval mode.

A document is cut into windows, each at most as long as the model's block, in reading order and without overlap.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from symphony_hf.errors import EvaluationError

Item = TypeVar("Item")

Windows = Mapping[str, Sequence[Tensor]]
"""Windows of token ids by document name, int64. Shape of each: (2 to block_size,)."""


class Batch(NamedTuple):
    """Windows of similar length, padded on the right."""

    indices: list[int]
    """Index of each row in the flat list of windows."""
    input_ids: Tensor
    """Shape: (windows, longest), int64."""
    attention_mask: Tensor
    """1 for tokens, 0 for padding. Same shape."""


def flatten(windows: Windows) -> tuple[list[Tensor], list[int]]:
    """Return all windows of all documents in one list, and the index of each window's document.

    Raises EvaluationError if there are no documents, a document has no windows, or a window is not a 1-D tensor of at
    least two integer tokens (one to read, one to predict).
    """
    if not windows:
        raise EvaluationError("no documents: an evaluation needs at least one")
    flat: list[Tensor] = []
    owners: list[int] = []
    for number, (name, parts) in enumerate(windows.items()):
        if not parts:
            raise EvaluationError(f"document {name!r} has no windows: leave out documents of fewer than two tokens")
        for window in parts:
            if window.dim() != 1 or len(window) < 2 or window.is_floating_point():
                raise EvaluationError(
                    f"document {name!r}: a window must be a 1-D tensor of at least 2 token ids, "
                    f"got shape {tuple(window.shape)}, {window.dtype}"
                )
        flat.extend(parts)
        owners.extend([number] * len(parts))
    return flat, owners


def padded_batches(
    flat: Sequence[Tensor], batch_size: int, device: torch.device, progress: str | None
) -> Iterator[Batch]:
    """Group windows into batches, longest first, so that padding is small and memory peaks in the first batch.

    Args:
        flat: Token ids, int64. Shape of each: (length,).
        batch_size: Number of windows in a batch.
        device: Device of the batches.
        progress: Label of the progress bar; no bar when None.

    Yields:
        Batches that contain every window once. Padding is on the right, where causal models do not see it.

    Raises:
        EvaluationError: If `batch_size` is not positive.
    """
    if batch_size < 1:
        raise EvaluationError(f"`batch_size` must be at least 1, got {batch_size}")
    order = sorted(range(len(flat)), key=lambda index: -len(flat[index]))
    starts = range(0, len(order), batch_size)
    # disable=None: no bar where the output is not a terminal, such as a log file.
    for start in tqdm(starts, desc=progress, unit=" batches", delay=2, disable=True if progress is None else None):
        indices = order[start : start + batch_size]
        # Any token id serves as padding, since the mask and causality both hide it.
        input_ids = nn.utils.rnn.pad_sequence([flat[index] for index in indices], batch_first=True)
        lengths = torch.tensor([len(flat[index]) for index in indices])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
        yield Batch(indices, input_ids.to(device), attention_mask.to(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into eval mode without gradients, and restore each module's mode afterwards. Yields its device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training


def chunked(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yield items in lists of `batch_size`, the last one shorter.

    Raises:
        EvaluationError: If `batch_size` is not positive.
    """
    if batch_size < 1:
        raise EvaluationError(f"`batch_size` must be at least 1, got {batch_size}")
    remaining = iter(items)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def question_bar(progress: str | None, total: int | None) -> "tqdm[Any]":
    """Return a progress bar of questions; a hidden one if the label is None."""
    return tqdm(total=total, desc=progress, unit=" questions", delay=2, disable=True if progress is None else None)
