"""What a corpus is: named documents in three splits, and the rule that puts a document into one of them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from symphony_hf.errors import DataError

Splits = Mapping[str, list["Document"]]

HELD_OUT = ("validation", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""How data sets spell a split -> our name of it."""

_BUCKETS = 20
"""Of equal size by hash; one is held out for validation, one for testing: 5% each."""


@dataclass(frozen=True)
class Document:
    """A text that belongs together: a file, a group of paragraphs, a row of a data set.

    Attributes:
        name: Says where the text came from, and seeds its corruption. Unique in its corpus.
        text: The text, as read.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, to validate on, and to test on.

    Attributes:
        train: Documents that models and tokenizers are trained on.
        validation: Documents for decisions made while developing.
        test: Documents for the reported numbers.
        source: What was read, for reports.
        commit: Of a data set of the Hub, where it is known.
    """

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    source: str
    commit: str | None = None


def by_name(document: Document) -> str:
    """Split key of files: an edited file stays in its split."""
    return document.name


def by_text(document: Document) -> str:
    """Split key of paragraphs and rows: two of the same text are never on both sides of a split."""
    return document.text


def complete_splits(given: Splits, key: Callable[[Document], str]) -> dict[str, list[Document]]:
    """Cut the held-out splits that are missing from the train split.

    The hash is of the key alone, so a document's split depends neither on the other documents nor on the machine.

    Args:
        given: Documents by split; "train" must be there.
        key: What of a document decides its split, `by_name` or `by_text`.

    Returns:
        The documents of all three splits, in their given order.
    """
    splits: dict[str, list[Document]] = {"train": []}
    for split in HELD_OUT:
        splits[split] = list(given.get(split, ()))
    missing = [split for split in HELD_OUT if split not in given]
    keys = (key(document) if document.text.strip() else None for document in given["train"])
    for document, split in zip(given["train"], assign_splits(keys, missing), strict=True):
        splits[split].append(document)
    return splits


def assign_splits(keys: Iterable[str | None], missing: Sequence[str]) -> list[str]:
    """Assign keys to train and to the splits that are missing, by the hash of each key alone.

    A split that the hashes leave empty, as they may with few keys, gets the key of the smallest hash that the others
    can spare.

    Args:
        keys: Keys in the order of their rows. Equal keys are in the same split; None, for a row without text, stays in
            train and fills no split.
        missing: Splits to cut from train.

    Returns:
        The split of each key. A split is empty only if there are fewer different keys than splits.
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
    """The split of whatever has this key: 5% each are for validation and for testing."""
    return _split_of_digest(_digest(key))


def _digest(key: str) -> bytes:
    # surrogatepass: a key may be the name of a file, which need not be valid text.
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _split_of_digest(digest: bytes) -> str:
    bucket = int.from_bytes(digest[:8], "big") % _BUCKETS
    return HELD_OUT[bucket] if bucket < len(HELD_OUT) else "train"


def build_corpus(splits: Splits, source: str, commit: str | None = None) -> Corpus:
    """Make a corpus of all documents that have any text.

    Args:
        splits: Documents by split, all three.
        source: What was read, for reports and for the error message.
        commit: Of a data set of the Hub, where it is known.

    Returns:
        The corpus, in which no split is empty.

    Raises:
        DataError: If a split has no text.
    """
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
"""Characters. A document of a large file ends at the first blank line after as many."""

_LONGEST_PIECE = 4 * _PIECE
"""Characters. It ends at the end of a line after as many, in a file without blank lines."""


def pieces_of(lines: Iterable[str]) -> Iterator[str]:
    """Group lines into pieces, which concatenated are the lines again."""
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
