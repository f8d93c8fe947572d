"""Tables by split, from a file, a folder, or a data set of the Hub; held-out splits, samples, and unusable rows."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from symphony_hf.errors import DataError, nearest

from .corpus import hub_name
from .datasets import TABLE_FORMATS, commit_of, digest_files, load_hub, load_table
from .documents import HELD_OUT, SPLIT_NAMES, assign_splits, rename_splits
from .files import entries_by_split

if TYPE_CHECKING:
    from datasets import Dataset


Item = TypeVar("Item")


class Rows(NamedTuple):
    """Rows by split.

    Attributes:
        splits: `train`, and `validation` and `test` if the source has them.
        revision: Commit of a data set of the Hub, if it is known, or SHA-256 of local files.
        source: Description of the source, for errors and notes.
    """

    splits: dict[str, "Dataset"]
    revision: str | None
    source: str


def read_rows(
    path: str,
    config: str | None,
    revision: str | None,
    *,
    instead: str,
    names: Mapping[str, str] = SPLIT_NAMES,
) -> Rows:
    """Read the rows of every split.

    Args:
        path: Table (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`), whose rows are all in the train split; folder of
            tables or subfolders named after splits; or data set of the Hub.
        config: Configuration on the Hub.
        revision: Branch, tag or commit on the Hub.
        instead: Alternative for the user if nothing is found, for the error message.
        names: Names of splits -> our names. The first name that a data set of the Hub has is used; for those of a
            folder, see `entries_by_split`.

    Raises:
        DataError: If `path` does not exist, cannot be read, or has no train split.
    """
    local = Path(path).expanduser()
    if path and local.exists():
        files = _files_by_split(local, names)
        splits = {split: _load_tables(paths) for split, paths in files.items()}
        return Rows(splits, digest_files(path for paths in files.values() for path in paths), path)
    loaded = load_hub(*hub_name(path, config), revision, instead)
    return Rows(rename_splits(loaded, path, names), commit_of(loaded), path)


def require_columns(rows: "Dataset", wanted: Sequence[str], where: str) -> None:
    """Check that rows have some columns. The DataError names the columns that are there."""
    for column in wanted:
        if column not in rows.column_names:
            found = ", ".join(f"`{name}`" for name in rows.column_names)
            hint = nearest(column, rows.column_names)
            hint = f"; {hint}" if hint.startswith("did") else ""
            raise DataError(f"{where}: no column `{column}`; its columns are {found}{hint}")


def cut_held_out(
    splits: Mapping[str, "Dataset"], key: Callable[[dict[str, Any]], str], wanted: Sequence[str] = HELD_OUT
) -> dict[str, "Dataset"]:
    """Cut the wanted splits that a source does not have from train by a key of each row; see `assign_splits`."""
    missing = [split for split in wanted if split not in splits]
    if not missing:
        return dict(splits)
    chosen: dict[str, list[int]] = {split: [] for split in ("train", *missing)}
    for index, split in enumerate(assign_splits(map(key, splits["train"]), missing)):
        chosen[split].append(index)
    return {**splits, **{split: splits["train"].select(indices) for split, indices in chosen.items()}}


def thinned(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """Return at most `limit` items, evenly spaced, whatever the seed."""
    if limit is None or len(items) <= limit:
        return items
    return [items[number * len(items) // limit] for number in range(limit)]


def thin_rows(rows: "Dataset", limit: int | None) -> "Dataset":
    """Return at most `limit` rows, evenly spaced."""
    return rows if limit is None or len(rows) <= limit else rows.select(thinned(range(len(rows)), limit))


def _files_by_split(local: Path, names: Mapping[str, str]) -> dict[str, list[Path]]:
    if local.is_file():
        if local.suffix.lower() not in TABLE_FORMATS:
            raise DataError(f"{local}: not a table; give a file with one of the suffixes {', '.join(TABLE_FORMATS)}")
        return {"train": [local]}
    files = {split: _tables_in(entries) for split, entries in entries_by_split(local, names).items()}
    files = {split: paths for split, paths in files.items() if paths}
    if "train" not in files:
        found = ", ".join(sorted(entry.name for entry in local.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{local}: no table for training; name one `train` ({', '.join(f'train{s}' for s in TABLE_FORMATS)}), and "
            f"others `validation` and `test`; this folder has {found}"
        )
    return files


def _tables_in(entries: list[Path]) -> list[Path]:
    files: list[Path] = []
    for entry in entries:
        files += sorted(entry.rglob("*")) if entry.is_dir() else [entry]
    return [file for file in files if file.suffix.lower() in TABLE_FORMATS and file.is_file()]


def _load_tables(paths: list[Path]) -> "Dataset":
    import datasets

    tables = [load_table(path) for path in paths]
    try:
        return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    except ValueError as error:
        names = ", ".join(path.name for path in paths)
        raise DataError(
            f"{paths[0].parent}: the tables of one split differ in their columns ({names}): {error}"
        ) from error


MOST_SKIPPED = 0.1
"""Maximum share of rows that are left out. A larger share points to a wrong setting or file, not to single bad rows."""

PROBLEM = "problem"
"""Column with the problem of a row: empty, or `<what>: <which>`. Rows are counted by the first part."""


def without_problems(rows: "Dataset", where: str, notes: list[str]) -> "Dataset":
    """Drop the rows with a `problem`, and this column. The order stays, and a note says how many were dropped.

    Raises:
        DataError: If more than a tenth of the rows have a problem, or no row is left.
    """
    problems: list[str] = rows[PROBLEM][:]
    kept = [index for index, problem in enumerate(problems) if not problem]
    num_skipped = len(problems) - len(kept)
    rows = rows.remove_columns(PROBLEM)
    if not problems:
        raise DataError(f"{where}: no rows; give a source that has some, or leave the split out")
    if num_skipped == 0:
        return rows
    counts = Counter(problem.partition(": ")[0] for problem in problems if problem)
    counted = ", ".join(f"{count:,} {what}" for what, count in counts.most_common())
    if num_skipped > MOST_SKIPPED * len(problems):
        first = next(index for index, problem in enumerate(problems) if problem)
        raise DataError(
            f"{where}: {num_skipped:,} of {len(problems):,} rows cannot be used: {counted}. The first is row {first} "
            f"({problems[first]}). At most {MOST_SKIPPED:.0%} are left out: mend the rows, or the setting that rules "
            "them out"
        )
    notes.append(f"{where}: {num_skipped:,} of {len(problems):,} rows were left out: {counted}")
    return rows.select(kept)
