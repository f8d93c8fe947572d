"""Documents from local files: one file, or a folder of them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from symphony_hf.errors import DataError, nearest
from symphony_hf.files import UNFINISHED

from .datasets import TABLE_FORMATS, commit_of, load_hub, load_table
from .documents import HELD_OUT, SPLIT_NAMES, Document, by_name, by_text, complete_splits, pieces_of

if TYPE_CHECKING:
    from datasets import Dataset


def read_table(path: Path, text_column: str, lines: bool = False) -> list[Document]:
    """Read the rows of a local table, each one document named `<file>[<row>]`.

    Args:
        path: A file with one of the suffixes in `TABLE_FORMATS`.
        text_column: The column that holds the text.
        lines: Whether rows are the lines of one text, which is cut into documents as a text file is.

    Returns:
        Documents in the order of the rows.

    Raises:
        DataError: If the file cannot be parsed, or the column is not there or not text.
    """
    return _row_documents(load_table(path), text_column, path.name, lines, where=str(path))


def read_hub(
    name: str, config: str | None, text_column: str, revision: str | None = None, lines: bool = False
) -> tuple[dict[str, list[Document]], str | None]:
    """Read a data set of the Hub, each row one document named `<split>[<row>]`.

    Args:
        name: The data set: `owner/name`.
        config: Its configuration, if it needs one.
        text_column: The column that holds the text.
        revision: Branch, tag or commit; the newest of the main branch when None.
        lines: Whether rows are the lines of one text, which is cut into documents as a text file is.

    Returns:
        Documents by split, and the commit they are of, where it is known. A missing validation or test split is cut
        from train by the hash of each row's text.

    Raises:
        DataError: If there is no such data set, it cannot be reached, it has no train split, or the column is not
            there or not text.
    """
    loaded = load_hub(name, config, revision, "leave data.path out to use the embedded corpus")
    named = {SPLIT_NAMES[split]: rows for split, rows in loaded.items() if split in SPLIT_NAMES}
    if "train" not in named:
        raise DataError(f"{name}: no train split; its splits are {', '.join(map(str, loaded))}")
    given = {
        split: _row_documents(rows, text_column, split, lines, where=f"{name}, {split} split")
        for split, rows in named.items()
    }
    return complete_splits(given, by_text), commit_of(loaded)


def _row_documents(rows: "Dataset", text_column: str, name: str, lines: bool, where: str) -> list[Document]:
    if text_column not in rows.column_names:
        hint = nearest(text_column, rows.column_names)
        raise DataError(f"{where}: no column `{text_column}` (data.text_column) to read the text from; {hint}")
    texts = []
    # The slice makes it one list; iterating the column itself would decode row by row.
    for index, text in enumerate(rows[text_column][:]):
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise DataError(f"{where}: row {index} of column `{text_column}` (data.text_column) is {kind}, not text")
        texts.append(text or "")
    if lines:  # which some data sets end, and some do not
        texts = list(pieces_of(text if text.endswith("\n") else f"{text}\n" for text in texts))
    return [Document(f"{name}[{index}]", text) for index, text in enumerate(texts)]


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
