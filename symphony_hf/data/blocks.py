"""Documents as blocks and windows of tokens, and rows as padded batches."""

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
"""Number of documents per call of the tokenizer."""

_PATIENCE = 2
"""Seconds before the progress bar appears."""


def pack_blocks(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", block_size: int) -> Tensor:
    """Concatenate all documents, each followed by the end-of-text token, and cut them into blocks.

    The tokenizer's other special tokens are not added. Tokens that do not fill a last block are dropped.

    Returns:
        Token ids, int64. Shape: (num_blocks, block_size).

    Raises:
        ConfigError: If `block_size` is less than 2, or the tokenizer has no end-of-text token.
        DataError: If there are too few tokens for one block.
    """
    _check_block_size(block_size)
    ids_T = token_stream(documents, tokenizer)
    num_blocks = count_blocks(len(documents), len(ids_T), block_size)
    return ids_T[: num_blocks * block_size].view(num_blocks, block_size)


def token_stream(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Concatenate all documents, each followed by the end-of-text token.

    Args:
        documents: Texts, in order.
        tokenizer: Tokenizer with an end-of-text token. Its other special tokens are not added.

    Returns:
        Token ids, int64. Shape: (tokens,).

    Raises:
        ConfigError: If the tokenizer has no end-of-text token.
    """
    # A list of Python integers would take four times the memory.
    token_ids = array("q")
    for document_ids in _tokenize(documents, tokenizer):
        token_ids.extend(document_ids)
    return torch.frombuffer(token_ids, dtype=torch.int64) if token_ids else torch.empty(0, dtype=torch.int64)


def count_blocks(num_documents: int, num_tokens: int, block_size: int, where: str = "") -> int:
    """Return the number of blocks that tokens fill. Too few for one raise DataError, which begins with `where`."""
    if num_tokens < block_size:
        raise DataError(
            f"{where and f'{where}: '}{num_documents:,} documents have {num_tokens:,} tokens, less than one block of "
            f"{block_size:,}; give more text, or a smaller block_size"
        )
    return num_tokens // block_size


def document_windows(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", block_size: int
) -> list[list[Tensor]]:
    """Cut each document, followed by the end-of-text token, into its own windows of at most `block_size` tokens.

    A statistic can then be computed per document and paired with that of the same document after an attack.

    Returns:
        The windows of each document, int64, in order and without overlap. A last window of one token has nothing to
        predict and is dropped; a document without text has no windows. Shape of each: (2 to block_size,).

    Raises:
        ConfigError: If `block_size` is less than 2, or the tokenizer has no end-of-text token.
    """
    _check_block_size(block_size)
    windows = []
    for document_ids in _tokenize(documents, tokenizer):
        pieces = torch.tensor(document_ids, dtype=torch.int64).split(block_size)
        windows.append([piece for piece in pieces if len(piece) > 1])
    return windows


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Dataset of blocks for the Trainer. The labels equal the inputs; the model shifts them.

    There is no attention mask because there is no padding.
    """

    def __init__(self, blocks: Tensor) -> None:
        """Wrap blocks of token ids, int64. Shape: (num_blocks, block_size)."""
        self.blocks = blocks

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one block as `input_ids` and a copy of them, `labels`. Shape of each: (block_size,)."""
        block = self.blocks[index]
        return {"input_ids": block, "labels": block.clone()}


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ConfigError(f"data: block_size must be 2 or more, so that there is a token to predict; got {block_size}")


def _tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Yield the token ids of each document, with the end-of-text token."""
    end_of_text(tokenizer)
    with tqdm(total=len(documents), desc="tokenizing", unit=" documents", delay=_PATIENCE, disable=None) as bar:
        for start in range(0, len(documents), _BATCH):
            texts = [document.text for document in documents[start : start + _BATCH]]
            yield from closed_ids(texts, tokenizer)
            bar.update(len(texts))


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the end-of-text token. Raises ConfigError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{type(tokenizer).__name__} has no end-of-text token; set its `eos_token`")
    return tokenizer.eos_token_id


def closed_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Tokenize each text and append the end-of-text token, unless it is the last already; no other special token."""
    # verbose=False: a document may be longer than the model's context, since blocks are not.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    end = tokenizer.eos_token_id
    # In a vocabulary of words, the end of a line and the end of the text are one token.
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in batch["input_ids"]]


NO_LABEL = -100
"""Label of a token that is not in the loss, the `ignore_index` of `torch.nn.CrossEntropyLoss`."""


def pad_rows(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad `input_ids` and `labels`, and make an `attention_mask`. Shape of each: (rows, longest), int64.

    Padding is on the right, where no token of a causal model sees it, whatever the tokenizer's padding side.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    return {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", NO_LABEL), "attention_mask": mask}


@dataclass(frozen=True)
class PadCollator:
    """Data collator that pads with `pad_rows`."""

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Return a batch of rows with `input_ids` and `labels`."""
        return pad_rows(rows, self.pad_id)
