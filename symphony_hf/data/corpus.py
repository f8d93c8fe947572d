"""One way to any corpus: none given, a file, a folder, or a data set of the Hub."""

import re
from pathlib import Path

from ..errors import DataError
from .documents import Corpus, Document, build_corpus
from .embedded import embedded_corpus
from .files import TEXT_SUFFIXES, read_file, read_folder
from .tables import TABLE_FORMATS, read_hub

__all__ = ["Corpus", "Document", "embedded_corpus", "load_corpus"]

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.+-]+))?")


def load_corpus(path: str | None, *, text_column: str = "text") -> Corpus:
    """Load documents in three splits.

    Args:
        path: One of
            - None: the embedded corpus, the sources of Python's standard library;
            - a text file (UTF-8) or a table (`.jsonl`, `.json`, `.csv`, `.parquet`);
            - a folder of text files, or one with its own `train`, `validation` and `test` files or subfolders;
            - a data set of the Hub, `owner/name` or `owner/name:configuration`.
        text_column: The column of a table or data set that holds the text.

    Returns:
        The corpus. Splits that the source does not have are cut from its train split, 5% each, by a hash that does
        not depend on the machine or on other documents. Documents without text are left out.

    Raises:
        DataError: If nothing is found at `path`, a split has no text, a file is not UTF-8, or there is no such column.
    """
    if path is None:
        return embedded_corpus()
    local = Path(path).expanduser()
    if path and local.is_dir():  # Path("") is the current folder
        splits = read_folder(local, text_column)
    elif local.is_file():
        splits = read_file(local, text_column)
    else:
        splits = _read_hub(path, text_column)
    return build_corpus(splits, source=path)


def _read_hub(path: str, text_column: str) -> dict[str, list[Document]]:
    match = _HUB_NAME.fullmatch(path)
    # A mistyped file name should fail now, not after half a minute of asking the Hub for it.
    if match is None or Path(path).suffix.lower() in TEXT_SUFFIXES | TABLE_FORMATS.keys():
        raise DataError(
            f"data.path: `{path}`: no such file or folder, and not the name of a reachable data set "
            "(`owner/name` or `owner/name:configuration`)"
        )
    return read_hub(match["name"], match["config"], text_column)
