"""Load a corpus from a file, a folder or a data set of the Hub, or the embedded one."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from symphony_hf.errors import DataError

from .datasets import TABLE_FORMATS
from .documents import Corpus, Document, build_corpus
from .embedded import embedded_corpus
from .files import TEXT_SUFFIXES, read_file, read_folder, read_hub

if TYPE_CHECKING:
    from symphony_hf.recipe import DataSection

__all__ = ["Corpus", "Document", "corpus_of", "embedded_corpus", "load_corpus"]

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.+-]+))?")


def load_corpus(
    path: str | None,
    *,
    text_column: str = "text",
    name: str | None = None,
    revision: str | None = None,
    lines: bool = False,
) -> Corpus:
    """Load documents in three splits.

    Args:
        path: Source of the corpus:
            - None: the embedded corpus, the source files of Python's standard library;
            - a text file (UTF-8) or a table (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`);
            - a folder of text files, or one with its own `train`, `validation` and `test` files or subfolders;
            - a data set of the Hub, `owner/name` or `owner/name:configuration`.
        text_column: Column of a table or data set that holds the text.
        name: Configuration of a data set of the Hub, if `path` does not give it.
        revision: Branch, tag or commit of a data set of the Hub.
        lines: Whether the rows of a table or data set are the lines of one text, including blank ones, which is cut
            into documents as a text file is. Otherwise, each row is a document.

    Returns:
        The corpus. Splits that the source does not have are cut from its train split, 5% each, by a hash that does
        not depend on the machine or on other documents. Documents without text are dropped.

    Raises:
        DataError: If `path` does not exist, a split has no text, a file is not UTF-8, or the column is missing.
    """
    if path is None:
        return embedded_corpus()
    commit = None
    local = Path(path).expanduser()
    if path and local.is_dir():  # Path("") is the current folder
        splits = read_folder(local, text_column, lines)
    elif local.is_file():
        splits = read_file(local, text_column, lines)
    else:
        repository, config = hub_name(path, name)
        splits, commit = read_hub(repository, config, text_column, revision, lines)
    return build_corpus(splits, source=path, commit=commit)


def corpus_of(section: "DataSection") -> Corpus:
    """Load the corpus of a recipe whose data is of kind `text`; see `load_corpus`."""
    return load_corpus(
        section.path,
        text_column=section.text_column,
        name=section.name,
        revision=section.revision,
        lines=section.rows == "lines",
    )


def hub_name(path: str, config: str | None = None) -> tuple[str, str | None]:
    """Split `owner/name` or `owner/name:configuration` of a data set of the Hub. `config` is used if the name has none.

    Raises:
        DataError: If `path` cannot be a name on the Hub, or two different configurations are given.
    """
    match = _HUB_NAME.fullmatch(path)
    # A mistyped file name should fail at once, not after half a minute of requests to the Hub.
    if match is None or Path(path).suffix.lower() in TEXT_SUFFIXES | TABLE_FORMATS.keys():
        raise DataError(
            f"data: `{path}`: no such file or folder, and not the name of a reachable data set "
            "(`owner/name` or `owner/name:configuration`)"
        )
    if match["config"] and config and match["config"] != config:
        raise DataError(f"data: path `{path}` gives one configuration and name `{config}` another: give only one")
    return match["name"], match["config"] or config
