"""Documents from local files: one file, or a folder of them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataError
from ..unfinished import UNFINISHED
from .documents import HELD_OUT, SPLIT_NAMES, Document, by_name, by_text, complete_splits
from .loading import TABLE_FORMATS
from .pieces import pieces_of
from .tables import read_table

TEXT_SUFFIXES = frozenset((".txt", ".text", ".md", ".rst", ".py", ".tokens"))
"""Of the files that are read from a folder. A file that is given itself may have any."""

_SPLIT_SUFFIXES = (TEXT_SUFFIXES | TABLE_FORMATS.keys()) - {".py"}
"""Of a file that is a split if it is named for one. `train.py` is a script."""


def read_file(path: Path, text_column: str, lines: bool = False) -> dict[str, list[Document]]:
    """Cut one file into documents, and those into splits by the hash of their text.

    Args:
        path: A text file, cut at blank lines into documents of about 2,000 characters; or a table, whose rows are
            the documents.
        text_column: The column that holds the text, if it is a table.
        lines: Whether rows of a table are the lines of one text, cut as a text file is.

    Returns:
        Documents by split.

    Raises:
        DataError: If the file is neither UTF-8 text nor a readable table.
    """
    return complete_splits({"train": _file_documents(path, text_column, lines)}, by_text)


def read_folder(folder: Path, text_column: str, lines: bool = False) -> dict[str, list[Document]]:
    """Read a folder, whose own splits are kept if it has any.

    It has if an entry is named for train (`train.txt`, `wiki.train.tokens`, `train-00000-of-00002.parquet`, or the
    subfolder `train`) and another for validation (or `valid`, `val`, `dev`) or test. Then all else in the folder is
    left out.

    Args:
        folder: Text files, at any depth, each one document. Hidden and unfinished ones are left out.
        text_column: The column that holds the text, in tables named for a split.

    Returns:
        Documents by split; missing splits are cut from train by the hash of the file's path or the piece's text.

    Raises:
        DataError: If there is no text file, or one is not UTF-8.
    """
    named = entries_by_split(folder)
    if "train" in named and any(split in named for split in HELD_OUT):
        given = {split: _entry_documents(entries, folder, text_column, lines) for split, entries in named.items()}
        return complete_splits(given, by_text)
    documents = _folder_documents(folder, folder)
    if not documents:
        raise DataError(f"{folder}: no text files in this folder; looked for {', '.join(sorted(TEXT_SUFFIXES))}")
    return complete_splits({"train": documents}, by_name)


def entries_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files and subfolders that are named for a split, by split, sorted."""
    named: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        parts = re.split("[.-]", entry.name.lower())
        splits = {SPLIT_NAMES[part] for part in parts if part in SPLIT_NAMES}
        readable = entry.is_dir() or entry.suffix.lower() in _SPLIT_SUFFIXES
        if len(splits) == 1 and readable and not entry.name.startswith("."):
            named.setdefault(splits.pop(), []).append(entry)
    return named


def _entry_documents(entries: Iterable[Path], folder: Path, text_column: str, lines: bool) -> list[Document]:
    documents = []
    for entry in entries:
        documents += _folder_documents(entry, folder) if entry.is_dir() else _file_documents(entry, text_column, lines)
    return documents


def _folder_documents(folder: Path, root: Path) -> list[Document]:
    documents = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") or part == UNFINISHED for part in name.parts)
        if path.suffix.lower() in TEXT_SUFFIXES and not hidden and path.is_file():
            documents.append(Document(name.as_posix(), "".join(_lines(path))))
    return documents


def _file_documents(path: Path, text_column: str, lines: bool) -> list[Document]:
    if path.suffix.lower() in TABLE_FORMATS:
        return read_table(path, text_column, lines)
    return [Document(f"{path.name}[{index}]", piece) for index, piece in enumerate(pieces_of(_lines(path)))]


def _lines(path: Path) -> Iterator[str]:
    try:
        # utf-8-sig: plain UTF-8, or with the mark that some editors put in front.
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file, or leave it out") from error
