"""Corpora: named documents in three splits, and the hash that assigns a document to one of them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from symphony_hf.errors import DataError

Splits = Mapping[str, list["Document"]]

HELD_OUT = ("validation", "test")
SPLITS = ("train", *HELD_OUT)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""Names of splits in data sets -> our names."""

_BUCKETS = 20
"""Number of hash buckets. One is held out for validation and one for testing, 5% each."""


Rows = TypeVar("Rows")


def rename_splits(loaded: Mapping[Any, Rows], source: str, names: Mapping[str, str] = SPLIT_NAMES) -> dict[str, Rows]:
    """Return the splits of a data set by our names. The first of the names that the source has is used.

    Raises DataError if there is no train split.
    """
    found: dict[str, Rows] = {}
    for name, split in names.items():
        if name in loaded:
            found.setdefault(split, loaded[name])
    if "train" not in found:
        raise DataError(f"{source}: no train split; its splits are {', '.join(map(str, loaded))}")
    return found


@dataclass(frozen=True)
class Document:
    """Coherent text: a file, a group of paragraphs, or a row of a data set.

    Attributes:
        name: Origin of the text, unique in its corpus. It also seeds the attacks on the document.
        text: The text as read.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents for training, validation and testing.

    Attributes:
        train: Documents to train models and tokenizers on.
        validation: Documents for decisions during development.
        test: Documents for reported numbers.
        source: Description of the source, for reports.
        commit: Commit of a data set of the Hub, if it is known.
    """

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    source: str
    commit: str | None = None


def by_name(document: Document) -> str:
    """Return the split key of a file: an edited file stays in its split."""
    return document.name


def by_text(document: Document) -> str:
    """Return the split key of a paragraph or row: equal texts are in the same split."""
    return document.text


def complete_splits(given: Splits, key: Callable[[Document], str]) -> dict[str, list[Document]]:
    """Cut the held-out splits that a source does not have from its train split by a key of each document.

    See `assign_splits`. Documents are in their given order; keys are `by_name` or `by_text`.
    """
    splits: dict[str, list[Document]] = {"train": [], **{split: list(given.get(split, ())) for split in HELD_OUT}}
    missing = [split for split in HELD_OUT if split not in given]
    keys = (key(document) if document.text.strip() else None for document in given["train"])
    for document, split in zip(given["train"], assign_splits(keys, missing), strict=True):
        splits[split].append(document)
    return splits


def assign_splits(keys: Iterable[str | None], missing: Sequence[str]) -> list[str]:
    """Assign keys to train and to the splits that are missing, by the hash of each key alone. Returns each key's split.

    Equal keys are in the same split; None, for a row without text, stays in train. A split that the hashes leave empty,
    as they may with few keys, gets the key of the smallest hash that the others can spare. It is empty only if there
    are fewer different keys than splits.
    """
    digests = [None if key is None else _digest(key) for key in keys]
    assigned: dict[bytes, str] = {}
    for digest in digests:
        if digest is not None:
            split = _split_of_digest(digest)
            assigned[digest] = split if split in missing else "train"
    for split in ("train", *missing):
        sizes = Counter(assigned.values())
        spare = (digest for digest, other in assigned.items() if sizes[other] > 1)
        if split not in sizes and (smallest := min(spare, default=None)):
            assigned[smallest] = split
    return ["train" if digest is None else assigned[digest] for digest in digests]


def split_of(key: str) -> str:
    """Return the split of a key: 5% of keys are for validation and 5% for testing."""
    return _split_of_digest(_digest(key))


def _digest(key: str) -> bytes:
    # surrogatepass: a key may be a file name that is not valid text.
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _split_of_digest(digest: bytes) -> str:
    bucket = int.from_bytes(digest[:8], "big") % _BUCKETS
    return HELD_OUT[bucket] if bucket < len(HELD_OUT) else "train"


def build_corpus(splits: Splits, source: str, commit: str | None = None) -> Corpus:
    """Build a corpus from the documents that have text. No split is empty: that raises DataError."""
    kept = {split: [document for document in splits[split] if document.text.strip()] for split in splits}
    counts = ", ".join(f"{len(documents):,} {split}" for split, documents in kept.items())
    for split, documents in kept.items():
        if not documents:
            raise DataError(
                f"{source}: the {split} split has no text (documents with text: {counts}); give more documents "
                "(a hundred are usually enough), or a folder or data set with its own train, validation and test splits"
            )
    return Corpus(kept["train"], kept["validation"], kept["test"], source, commit)


_PIECE = 2_000
"""Number of characters after which a document of a text file ends at the next blank line."""

_LONGEST_PIECE = 4 * _PIECE
"""Number of characters after which it ends at the next line, blank or not."""


def pieces_of(lines: Iterable[str]) -> Iterator[str]:
    """Group lines into pieces whose concatenation is the lines."""
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= _LONGEST_PIECE or (size >= _PIECE and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
