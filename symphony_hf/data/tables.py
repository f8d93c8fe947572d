"""Documents from rows: of local tables, and of data sets of the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, nearest
from .documents import SPLIT_NAMES, Document, by_text, complete_splits
from .loading import commit_of, load_hub, load_table
from .pieces import pieces_of

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
