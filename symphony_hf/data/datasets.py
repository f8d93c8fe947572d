"""Local tables and data sets of the Hub, read by the `datasets` library, and digests of what was read."""

import csv
import glob
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
"""Part of the error that `datasets` raises for a table without rows."""

_COMMIT = re.compile("[0-9a-f]{40}")


def _only(path: Path) -> str:
    """Return a path as `datasets` takes it: as a pattern, which may match other files."""
    return glob.escape(str(path))


def load_table(path: Path) -> "Dataset":
    """Read the rows of a local table. Raises DataError if it cannot be parsed or has none."""
    import datasets

    suffix = path.suffix.lower()
    try:
        return datasets.load_dataset(TABLE_FORMATS[suffix], data_files=_only(path), split="train", **_settings(suffix))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if _NO_ROWS in str(error):
            raise DataError(f"{path}: this table has no rows; give one that has, or leave it out") from error
        raise DataError(f"{path}: not a readable {path.suffix} table ({error.__cause__ or error})") from error


def load_hub(name: str, config: str | None, revision: str | None, instead: str) -> "DatasetDict":
    """Read all splits of a data set of the Hub, at the head of the main branch if `revision` is None.

    `instead` is an alternative for the user, for the error message.

    Raises:
        DataError: If there is no such data set, or it cannot be reached.
    """
    import datasets

    with _hub_errors(name, instead):
        return datasets.load_dataset(name, config, **_given(revision=revision))


def open_hub(
    name: str, config: str | None, revision: str | None, instead: str
) -> tuple[dict[str, "IterableDataset"], str | None]:
    """Open all splits of a data set of the Hub as streams.

    Args:
        name: Name of the data set: `owner/name`.
        config: Configuration, if the data set needs one.
        revision: Branch, tag or commit; the head of the main branch when None.
        instead: Alternative for the user, for the error message.

    Returns:
        The splits by their names, and the commit, if it is known.

    Raises:
        DataError: If there is no such data set, or it cannot be reached.
    """
    import datasets

    with _hub_errors(name, instead):
        builder = datasets.load_dataset_builder(name, config, **_given(revision=revision))
        return dict(builder.as_streaming_dataset()), builder.hash if _COMMIT.fullmatch(builder.hash or "") else None


def has_configuration(name: str, config: str, revision: str | None, instead: str) -> bool:
    """Return whether a data set of the Hub, or its copy in the cache when offline, has a configuration.

    Arguments and errors: `load_hub`.
    """
    import datasets

    with _hub_errors(name, instead):
        try:  # `datasets` can list configurations, but not those in the cache
            datasets.load_dataset_builder(name, config, **_given(revision=revision))
        except ValueError:
            return False
    return True


def open_table(path: Path) -> "IterableDataset":
    """Open a local table as a stream."""
    import datasets

    suffix = path.suffix.lower()
    return datasets.load_dataset(
        TABLE_FORMATS[suffix], data_files=_only(path), split="train", streaming=True, **_settings(suffix)
    )


def commit_of(loaded: "DatasetDict") -> str | None:
    """Return the commit on the Hub that a data set was read from, or None if it is not known.

    `datasets` names the folder of its cache after the commit.
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
    # RuntimeError: `datasets` no longer runs data sets that are scripts.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data: `{name}`: no such file or folder, and not a data set that can be reached and read ({error}); "
            f"check the spelling (`owner/name` or `owner/name:configuration`) and the network, or {instead}"
        ) from error


def _settings(suffix: str) -> dict[str, Any]:
    """Return the settings of a reader. In GLUE's tables with tabs, quotation marks are plain characters."""
    if TABLE_FORMATS[suffix] != "csv":
        return {}
    only_empty_is_missing = {"keep_default_na": False, "na_values": [""]}  # `None` and `NA` are words, too
    return only_empty_is_missing | ({"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {})


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show progress bars of `datasets` only if they are wanted and stderr is a terminal; restore the setting after."""
    if shown and sys.stderr.isatty():  # asked first: importing `datasets` takes seconds
        yield
        return
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


_CHUNK = 1 << 20


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts in order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))  # so that ["ab", "c"] is not ["a", "bc"]
        digest.update(encoded)
    return digest.hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of rows in order, each written as JSON."""
    return digest_texts(json.dumps(row, sort_keys=True) for row in rows)


def digest_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the contents of files in order, whatever their names."""
    whole = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        whole.update(digest.digest())
    return whole.hexdigest()
