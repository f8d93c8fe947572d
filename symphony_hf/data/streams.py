"""Streams of text, read, tokenized and cut into blocks during training, for data that does not fit on the disk."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from symphony_hf.errors import DataError, nearest

from .blocks import closed_ids, end_of_text
from .corpus import hub_name
from .datasets import TABLE_FORMATS, open_hub, open_table
from .documents import HELD_OUT, Corpus, Document, rename_splits, split_of
from .packing import make_block

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

    from symphony_hf.recipe import DataSection

SHUFFLED = 10_000
"""Size of the shuffle buffer, in documents."""

TOKENIZED = 1_000
"""Number of documents that are tokenized together. Their tokens that do not fill a last block are dropped."""

HELD_OUT_DOCUMENTS = 500
"""Maximum number of documents of each held-out split, which is read before training."""


class TextStream(NamedTuple):
    """Stream of training blocks with the columns of `TokenBlocks`, and held-out documents in memory."""

    blocks: "IterableDataset"
    held_out: dict[str, list[Document]]
    revision: str | None


class EndlessStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Passes over a stream, one after another and each in its own order, as a single dataset without end.

    Trainer resumes by skipping what was read in the current pass over its dataset, and counts no passes over a dataset
    without a length.

    Args:
        rows: Stream with `set_epoch`.
    """

    def __init__(self, rows: "IterableDataset") -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of each pass; none without end if a worker has no share of the stream."""
        for number in itertools.count():
            rows = copy.deepcopy(self.rows)  # workers share the stream's epoch
            rows.set_epoch(number)
            is_empty = True
            for row in rows:
                is_empty = False
                yield row
            if is_empty:
                return


def open_stream(section: "DataSection", tokenizer: "PreTrainedTokenizerBase", seed: int) -> TextStream:
    """Open a data set of the Hub, or a local table, as a stream.

    Missing validation and test splits are cut from train by the hash of a document's text, as without streaming.

    Args:
        section: Data section of a recipe.
        tokenizer: The model's tokenizer.
        seed: Seed of the order. Each document is drawn from the next `SHUFFLED` ones.

    Raises:
        DataError: If the source cannot be streamed, has no such column, or has too little text.
        ConfigError: If the tokenizer has no end-of-text token.
    """
    end_of_text(tokenizer)
    splits, revision = _open(section)
    column = section.text_column
    for split, rows in splits.items():
        _check_column(rows, column, f"{section.path}, {split} split")
    missing = [split for split in HELD_OUT if split not in splits]
    most = min(section.limit or HELD_OUT_DOCUMENTS, HELD_OUT_DOCUMENTS)
    held_out = _take_by_hash(splits["train"], column, missing, most)
    for split in HELD_OUT:
        if split not in missing:
            held_out[split] = list(_documents(splits[split].take(most), column, split))
        if not held_out[split]:
            raise DataError(f"{section.path}: the {split} split has no text; give a source that has more")
    train = splits["train"].filter(_is_for_training, fn_kwargs={"column": column, "missing": missing})
    train = train if section.limit is None else train.take(section.limit)
    if next(iter(_cut(train.take(TOKENIZED), section, tokenizer)), None) is None:
        raise DataError(
            f"{section.path}: the first {TOKENIZED:,} documents for training do not fill one block of "
            f"{section.block_size:,} tokens; give more text, or a smaller block_size"
        )
    shuffled = train.shuffle(seed=seed, buffer_size=SHUFFLED)
    return TextStream(_cut(shuffled, section, tokenizer), {split: held_out[split] for split in HELD_OUT}, revision)


def sample_stream(section: "DataSection") -> Corpus:
    """Read the first training documents of a stream, to train a tokenizer on.

    Args:
        section: Data section of a recipe.

    Returns:
        A corpus of the first `SHUFFLED` documents, with empty held-out splits.

    Raises:
        DataError: If the source cannot be streamed, or has no such column.
    """
    splits, revision = _open(section)
    assert section.path is not None  # `_open` refuses it
    column, missing = section.text_column, [split for split in HELD_OUT if split not in splits]
    _check_column(splits["train"], column, f"{section.path}, train split")
    rows = splits["train"].filter(_is_for_training, fn_kwargs={"column": column, "missing": missing})
    return Corpus(list(_documents(rows.take(SHUFFLED), column, "train")), [], [], section.path, revision)


def _open(section: "DataSection") -> tuple[dict[str, "IterableDataset"], str | None]:
    local = None if section.path is None else Path(section.path).expanduser()
    if local is not None and local.is_file() and local.suffix.lower() in TABLE_FORMATS:
        return {"train": open_table(local)}, None
    if section.path is None or (local is not None and local.exists()):
        what = f"`{local}`" if local is not None else "the library sources of the running Python"
        raise DataError(
            f"data: streaming: {what} cannot be streamed: give a data set of the Hub or a table "
            f"({', '.join(TABLE_FORMATS)}), or leave `streaming` out"
        )
    name, config = hub_name(section.path, section.name)
    loaded, commit = open_hub(name, config, section.revision, instead="give a table, which can be streamed, too")
    return rename_splits(loaded, section.path), commit


def _check_column(rows: "IterableDataset", column: str, where: str) -> None:
    from datasets.exceptions import DatasetsError

    try:
        first: Mapping[str, Any] | None = next(iter(rows), None)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{where}: cannot be read ({error})") from error
    if first is None:
        raise DataError(f"{where}: no rows; give a source that has some")
    if column not in first:
        raise DataError(f"{where}: no column `{column}` (text_column); {nearest(column, first)}")
    if not isinstance(first[column], str | None):
        raise DataError(f"{where}: column `{column}` (text_column) is {type(first[column]).__name__}, not text")


def _documents(rows: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[Document]:
    for index, row in enumerate(rows):
        if row[column] and row[column].strip():
            yield Document(f"{name}[{index}]", row[column])


def _take_by_hash(
    rows: Iterable[Mapping[str, Any]], column: str, wanted: list[str], most: int
) -> dict[str, list[Document]]:
    taken: dict[str, list[Document]] = {split: [] for split in wanted}
    if wanted:
        for document in _documents(rows, column, "train"):
            split = split_of(document.text)
            if split in taken and len(taken[split]) < most:
                taken[split].append(document)
            if all(len(documents) == most for documents in taken.values()):
                break
    return taken


def _is_for_training(row: Mapping[str, Any], column: str, missing: list[str]) -> bool:
    text = row[column]
    return bool(text and text.strip()) and split_of(text) not in missing


def _cut(
    documents: "IterableDataset", section: "DataSection", tokenizer: "PreTrainedTokenizerBase"
) -> "IterableDataset":
    """Cut the documents into blocks, `TOKENIZED` documents at a time."""
    return documents.select_columns([section.text_column]).map(
        _cut_batch,
        batched=True,
        batch_size=TOKENIZED,
        remove_columns=[section.text_column],
        input_columns=[section.text_column],
        fn_kwargs={"tokenizer": tokenizer, "block_size": section.block_size, "packing": section.packing},
    )


def _cut_batch(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", block_size: int, packing: bool
) -> dict[str, list[list[int]]]:
    documents = closed_ids(texts, tokenizer)
    tokens = np.concatenate([np.array(document, dtype=np.int64) for document in documents])
    ends = np.cumsum([len(document) for document in documents])
    starts = np.concatenate([[0], ends[:-1]])
    names = ["input_ids", "labels", *(["position_ids"] if packing else [])]
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    for begin in range(0, len(tokens) - block_size + 1, block_size):
        first, last = np.searchsorted(starts, [begin, begin + block_size])
        block = make_block(tokens[begin : begin + block_size], starts[first:last] - begin if packing else None)
        for name in names:
            columns[name].append(block[name].tolist())
    return columns
