"""Tables as the `datasets` library reads them: local files, and data sets of the Hub."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_hf.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset


TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Suffix of a local table -> its name in `datasets`."""

_NO_ROWS = "corresponds to no data"
"""What `datasets` says of a table without rows, which it does not read."""

_COMMIT = re.compile("[0-9a-f]{40}")


def load_table(path: Path) -> "Dataset":
    """Read the rows of a local table.

    Args:
        path: A file with one of the suffixes in `TABLE_FORMATS`.

    Raises:
        DataError: If the file cannot be parsed, or has no rows.
    """
    import datasets

    suffix = path.suffix.lower()
    try:
        return datasets.load_dataset(TABLE_FORMATS[suffix], data_files=str(path), split="train", **_settings(suffix))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if _NO_ROWS in str(error):
            raise DataError(f"{path}: this table has no rows; give one that has, or leave it out") from error
        raise DataError(f"{path}: not a readable {path.suffix} table ({error.__cause__ or error})") from error


def load_hub(name: str, config: str | None, revision: str | None, instead: str) -> "DatasetDict":
    """Read a data set of the Hub, all its splits by their own names.

    Args:
        name: The data set: `owner/name`.
        config: Its configuration, if it needs one.
        revision: Branch, tag or commit; the newest of the main branch when None.
        instead: What else the user can do, in the error message.

    Raises:
        DataError: If there is no such data set, or it cannot be reached.
    """
    import datasets

    with _hub_errors(name, instead):
        return datasets.load_dataset(name, config, **_given(revision=revision))


def open_hub(
    name: str, config: str | None, revision: str | None, instead: str
) -> tuple[dict[str, "IterableDataset"], str | None]:
    """Open a data set of the Hub as streams, by its own names of splits, and tell the commit that they are of.

    Args:
        name: The data set: `owner/name`.
        config: Its configuration, if it needs one.
        revision: Branch, tag or commit; the newest of the main branch when None.
        instead: What else the user can do, in the error message.

    Raises:
        DataError: If there is no such data set, or it cannot be reached.
    """
    import datasets

    with _hub_errors(name, instead):
        builder = datasets.load_dataset_builder(name, config, **_given(revision=revision))
        return dict(builder.as_streaming_dataset()), builder.hash if _COMMIT.fullmatch(builder.hash or "") else None


def open_table(path: Path) -> "IterableDataset":
    """Open a local table as a stream.

    Args:
        path: A file with one of the suffixes in `TABLE_FORMATS`.
    """
    import datasets

    suffix = path.suffix.lower()
    return datasets.load_dataset(
        TABLE_FORMATS[suffix], data_files=str(path), split="train", streaming=True, **_settings(suffix)
    )


def commit_of(loaded: "DatasetDict") -> str | None:
    """The commit on the Hub that a data set was read from; None where `datasets` does not say.

    It names the folder of its cache by the commit.
    """
    for rows in loaded.values():
        for file in rows.cache_files:
            if _COMMIT.fullmatch(Path(file["filename"]).parent.name):
                return Path(file["filename"]).parent.name
    return None


@contextmanager
def _hub_errors(name: str, instead: str) -> Iterator[None]:
    import datasets

    try:
        yield
    # RuntimeError: a data set that is a script, which `datasets` no longer runs.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.path: `{name}`: no such file or folder, and not a data set that can be reached and read ({error}); "
            f"check the spelling (`owner/name` or `owner/name:configuration`) and the network, or {instead}"
        ) from error


def _settings(suffix: str) -> dict[str, Any]:
    """GLUE's tables with tabs have quotation marks that are nothing but that."""
    return {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Have its bars only where they are wanted and a terminal shows them, and leave the switch as it was."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (shown and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


_CHUNK = 1 << 20


def digest_texts(texts: Iterable[str]) -> str:
    """Of texts in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))  # so that ["ab", "c"] is not ["a", "bc"]
        digest.update(encoded)
    return digest.hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """Of anything that JSON can write, row by row."""
    return digest_texts(json.dumps(row, sort_keys=True) for row in rows)


def digest_files(paths: Iterable[Path]) -> str:
    """Of the contents of files in their order; their names do not matter."""
    whole = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        whole.update(digest.digest())
    return whole.hexdigest()
