"""From documents to the tensors that a model is trained and evaluated on."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from symphony_hf.errors import ConfigError, DataError

from .documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH = 256
"""Documents that are tokenized in one call."""

_PATIENCE = 2
"""Seconds before a progress bar appears."""


def pack_blocks(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", block_size: int) -> Tensor:
    """Concatenate all documents, each closed by the end-of-text token, and cut them into blocks.

    Args:
        documents: Texts, in order.
        tokenizer: Any with an end-of-text token. Its other special tokens are not added.
        block_size: Tokens in a block.

    Returns:
        Token ids, int64; the tokens that do not fill a last block are dropped. Shape: (num_blocks, block_size).

    Raises:
        ConfigError: If a block is shorter than two tokens, or the tokenizer has no end-of-text token.
        DataError: If there are too few tokens for one block.
    """
    _check_block_size(block_size)
    ids_T = token_stream(documents, tokenizer)
    num_blocks = count_blocks(len(documents), len(ids_T), block_size)
    return ids_T[: num_blocks * block_size].view(num_blocks, block_size)


def token_stream(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Concatenate all documents, each closed by the end-of-text token.

    Args:
        documents: Texts, in order.
        tokenizer: Any with an end-of-text token. Its other special tokens are not added.

    Returns:
        Token ids, int64. Shape: (tokens,).

    Raises:
        ConfigError: If the tokenizer has no end-of-text token.
    """
    # A flat array of machine integers: a list of Python ones would take four times the memory.
    token_ids = array("q")
    for document_ids in _tokenize(documents, tokenizer):
        token_ids.extend(document_ids)
    return torch.frombuffer(token_ids, dtype=torch.int64) if token_ids else torch.empty(0, dtype=torch.int64)


def count_blocks(num_documents: int, num_tokens: int, block_size: int) -> int:
    """How many blocks the tokens of some documents fill.

    Raises:
        DataError: If they do not fill one.
    """
    if num_tokens < block_size:
        raise DataError(
            f"{num_documents:,} documents have {num_tokens:,} tokens, less than one block of {block_size:,}; "
            "give more text, or a smaller block_size"
        )
    return num_tokens // block_size


def document_windows(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", block_size: int
) -> list[list[Tensor]]:
    """Cut each document, closed by the end-of-text token, into windows of its own.

    So a statistic can be taken per document, and paired with that of the same document corrupted.

    Args:
        documents: Texts, in order.
        tokenizer: Any with an end-of-text token. Its other special tokens are not added.
        block_size: Tokens in a window; the last of a document may be shorter.

    Returns:
        The windows of each document, int64, in order and without overlap. A last window of one token has nothing to
        predict and is dropped; a document without text has no windows. Shape of each: (2 to block_size,).

    Raises:
        ConfigError: If a window is shorter than two tokens, or the tokenizer has no end-of-text token.
    """
    _check_block_size(block_size)
    windows = []
    for document_ids in _tokenize(documents, tokenizer):
        pieces = torch.tensor(document_ids, dtype=torch.int64).split(block_size)
        windows.append([piece for piece in pieces if len(piece) > 1])
    return windows


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks as the Trainer takes them: the labels are the inputs, which the model shifts.

    There is no attention mask, because nothing is padded.
    """

    def __init__(self, blocks: Tensor) -> None:
        """Wrap blocks of token ids.

        Args:
            blocks: Token ids, int64. Shape: (num_blocks, block_size).
        """
        self.blocks = blocks

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One block as `input_ids` and, in memory of their own, `labels`. Shape of each: (block_size,)."""
        block = self.blocks[index]
        return {"input_ids": block, "labels": block.clone()}


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ConfigError(f"data: block_size must be 2 or more, so that there is a token to predict; got {block_size}")


def _tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """The token ids of each document, and the end-of-text token."""
    end_of_text(tokenizer)
    with tqdm(total=len(documents), desc="tokenizing", unit=" documents", delay=_PATIENCE, disable=None) as bar:
        for start in range(0, len(documents), _BATCH):
            texts = [document.text for document in documents[start : start + _BATCH]]
            yield from closed_ids(texts, tokenizer)
            bar.update(len(texts))


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that closes a document.

    Raises:
        ConfigError: If the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{type(tokenizer).__name__} has no end-of-text token; set its `eos_token`")
    return tokenizer.eos_token_id


def closed_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The token ids of each text, and the end of text unless it ends in it; no other special token."""
    # Not verbose: it would warn that a document is longer than the model's context, which blocks are not.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    end = tokenizer.eos_token_id
    # The end of a line of words is the end of text, too, and of one line there are not two.
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in batch["input_ids"]]


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
