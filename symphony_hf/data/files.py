"""Documents of a local file, a folder, or a data set of the Hub."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from symphony_hf.errors import DataError, SymphonyWarning, nearest
from symphony_hf.files import UNFINISHED

from .datasets import TABLE_FORMATS, commit_of, load_hub, load_table
from .documents import HELD_OUT, SPLIT_NAMES, Document, by_name, by_text, complete_splits, pieces_of, rename_splits

if TYPE_CHECKING:
    from datasets import Dataset


def read_table(path: Path, text_column: str, lines: bool = False, name: str | None = None) -> list[Document]:
    """Read the rows of a local table as documents named `<name>[<row>]`, by default after the file.

    With `lines`, rows are the lines of one text, which is cut into documents as a text file is.

    Raises:
        DataError: If the file cannot be parsed, or the column is missing or is not text.
    """
    return _row_documents(load_table(path), text_column, name or path.name, lines, where=str(path))


def read_hub(
    name: str, config: str | None, text_column: str, revision: str | None = None, lines: bool = False
) -> tuple[dict[str, list[Document]], str | None]:
    """Read the rows of a data set of the Hub as documents named `<split>[<row>]`. Arguments: `load_hub`, `read_table`.

    Returns:
        Documents by split, and their commit, if it is known. A missing validation or test split is cut from train by
        the hash of each row's text.

    Raises:
        DataError: If there is no such data set, it cannot be reached, it has no train split, or the column is missing
            or is not text.
    """
    loaded = load_hub(name, config, revision, "leave it out to use the running Python's library")
    given = {
        split: _row_documents(rows, text_column, split, lines, where=f"{name}, {split} split")
        for split, rows in rename_splits(loaded, name).items()
    }
    return complete_splits(given, by_text), commit_of(loaded)


def _row_documents(rows: "Dataset", text_column: str, name: str, lines: bool, where: str) -> list[Document]:
    if text_column not in rows.column_names:
        hint = nearest(text_column, rows.column_names)
        raise DataError(f"{where}: no column `{text_column}` (text_column) to read the text from; {hint}")
    texts = []
    # The slice decodes the column at once; iterating it would decode row by row.
    for index, text in enumerate(rows[text_column][:]):
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise DataError(f"{where}: row {index} of column `{text_column}` (text_column) is {kind}, not text")
        texts.append(text or "")
    if lines:  # with or without their line breaks, depending on the data set
        texts = list(pieces_of(text if text.endswith("\n") else f"{text}\n" for text in texts))
    return [Document(f"{name}[{index}]", text) for index, text in enumerate(texts)]


TEXT_SUFFIXES = frozenset((".txt", ".text", ".md", ".rst", ".py", ".tokens"))
"""Suffixes of text files that are read from a folder. A single file may have any suffix."""

_SPLIT_SUFFIXES = (TEXT_SUFFIXES | TABLE_FORMATS.keys()) - {".py"}
"""Suffixes of files that are a split if they are named after one. `train.py` is a script."""


def read_file(path: Path, text_column: str, lines: bool = False) -> dict[str, list[Document]]:
    """Read one file as documents, split by the hash of their text.

    A text file is cut at blank lines into documents of about 2,000 characters. The rows of a table are the documents,
    or, with `lines`, the lines of a text file.

    Raises:
        DataError: If the file is neither UTF-8 text nor a readable table.
    """
    return complete_splits({"train": _file_documents(path, text_column, lines)}, by_text)


def read_folder(folder: Path, text_column: str, lines: bool = False) -> dict[str, list[Document]]:
    """Read a folder of text files at any depth, each one document, with its own splits if it has any.

    A folder has splits if one entry is named after train (`train.txt`, `wiki.train.tokens`,
    `train-00000-of-00002.parquet`, or the subfolder `train`) and another after validation (or `valid`, `val`, `dev`) or
    test. Other entries are then ignored, as hidden and unfinished files always are. Missing splits are cut from train
    by the hash of the file's path or the document's text. `text_column` and `lines` are for tables named after a split,
    or in a subfolder named after one. Tables among text files are left out.

    Raises:
        DataError: If there is no text file, and no table of a split; or if a text file is not UTF-8.

    Warns:
        SymphonyWarning: If tables are left out.
    """
    named = entries_by_split(folder)
    left_out: list[str] = []
    if "train" in named and any(split in named for split in HELD_OUT):
        given = {
            split: _entry_documents(entries, folder, text_column, lines, left_out) for split, entries in named.items()
        }
        splits = complete_splits(given, by_text)
    else:
        texts, tables = _files_in(folder, folder)
        if not texts and tables:
            raise DataError(
                f"{folder}: no text file in this folder, and `{next(iter(tables))}` is a table that is not named after "
                "a split: give the table itself, or name tables after splits (`train.jsonl` and `test.jsonl`)"
            )
        if not texts:
            raise DataError(f"{folder}: no text files in this folder; looked for {', '.join(sorted(TEXT_SUFFIXES))}")
        left_out += tables
        splits = complete_splits({"train": _text_documents(texts)}, by_name)
    warn_of_tables(folder, left_out)
    return splits


def warn_of_tables(source: Path, left_out: Sequence[str]) -> None:
    """Warn of the tables that are left out of a folder or archive of text files."""
    if left_out:
        number = f"{len(left_out)} table{'s' if len(left_out) > 1 else ''}"
        warnings.warn(
            f"{source}: {number} among its text files left out, such as `{left_out[0]}`: give a table itself as "
            "`data.path` to read it",
            SymphonyWarning,
            stacklevel=3,
        )


def has_tables(path: Path) -> bool:
    """Return whether a file is a table, or a folder has one, whether it is read or left out."""
    return bool(_files_in(path, path)[1]) if path.is_dir() else _is_table(path)


def entries_by_split(folder: Path, names: Mapping[str, str] = SPLIT_NAMES) -> dict[str, list[Path]]:
    """Return the files and subfolders that are named after a split, by split, sorted.

    `names` are names of splits -> our names, and those of `SPLIT_NAMES` are known in any case. A split is all entries
    that are named after it, or, if the folder has a name that is not in `SPLIT_NAMES`, those with the first such name.
    """
    own = {name: split for name, split in names.items() if name not in SPLIT_NAMES}
    known = {**own, **SPLIT_NAMES}
    named: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        found = known.keys() & set(re.split("[.-]", entry.name.lower()))
        readable = entry.is_dir() or entry.suffix.lower() in _SPLIT_SUFFIXES
        if len({known[name] for name in found}) == 1 and readable and not entry.name.startswith("."):
            named.setdefault(min(found, key=list(known).index), []).append(entry)
    splits: dict[str, list[Path]] = {}
    for name, split in SPLIT_NAMES.items():
        splits.setdefault(split, []).extend(named.get(name, ()))
    splits |= {split: named[name] for name, split in reversed(own.items()) if name in named}
    return {split: sorted(entries) for split, entries in splits.items() if entries}


def _entry_documents(
    entries: Iterable[Path], folder: Path, text_column: str, lines: bool, left_out: list[str]
) -> list[Document]:
    """Read the files and subfolders of a split. The names of tables among text files are added to `left_out`."""
    documents = []
    for entry in entries:
        if not entry.is_dir():
            documents += _file_documents(entry, text_column, lines)
            continue
        texts, tables = _files_in(entry, folder)
        if texts:
            documents += _text_documents(texts)
            left_out += tables
            continue
        for name, path in tables.items():
            documents += read_table(path, text_column, lines, name)
    return documents


def _files_in(folder: Path, root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the text files and the tables in a folder at any depth, by their names from `root`, sorted."""
    texts: dict[str, Path] = {}
    tables: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") or part == UNFINISHED for part in name.parts)
        if path.suffix.lower() in TEXT_SUFFIXES | TABLE_FORMATS.keys() and not hidden and path.is_file():
            (tables if _is_table(path) else texts)[name.as_posix()] = path
    return texts, tables


def _text_documents(files: Mapping[str, Path]) -> list[Document]:
    return [Document(name, "".join(_lines(path))) for name, path in files.items()]


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_FORMATS


def _file_documents(path: Path, text_column: str, lines: bool) -> list[Document]:
    if _is_table(path):
        return read_table(path, text_column, lines)
    return [Document(f"{path.name}[{index}]", piece) for index, piece in enumerate(pieces_of(_lines(path)))]


def _lines(path: Path) -> Iterator[str]:
    try:
        # utf-8-sig: some editors put a byte order mark in front.
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file, or leave it out") from error
