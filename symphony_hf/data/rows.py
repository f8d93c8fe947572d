"""Tables in splits, from wherever they are: a file, a folder, or a data set of the Hub."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from symphony_hf.errors import DataError, nearest

from .corpus import hub_name
from .datasets import TABLE_FORMATS, commit_of, digest_files, load_hub, load_table
from .documents import HELD_OUT, SPLIT_NAMES, assign_splits
from .files import entries_by_split

if TYPE_CHECKING:
    from datasets import Dataset


Item = TypeVar("Item")


class Rows(NamedTuple):
    """Rows by split.

    Attributes:
        splits: `train`, and those of `validation` and `test` that the source has.
        revision: The commit of a data set of the Hub, where it is known; the SHA-256 of local files.
        source: What was read, for errors and notes.
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
        path: A table (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`), whose rows are all for training; a folder of
            tables or subfolders named for splits; or a data set of the Hub.
        config: Its configuration on the Hub.
        revision: Its branch, tag or commit there.
        instead: What else a user can do when nothing is found, in the error message.
        names: How the source spells a split -> our name of it; the first that it has is taken.

    Raises:
        DataError: If there is nothing at `path`, it cannot be read, or it has no train split.
    """
    local = Path(path).expanduser()
    if path and local.exists():
        files = _files_by_split(local)
        splits = {split: _load_tables(paths) for split, paths in files.items()}
        return Rows(splits, digest_files(path for paths in files.values() for path in paths), path)
    loaded = load_hub(*hub_name(path, config), revision, instead)
    found: dict[str, Dataset] = {}
    for spelled, split in names.items():
        if spelled in loaded:
            found.setdefault(split, loaded[spelled])
    if "train" not in found:
        raise DataError(f"{path}: no train split; its splits are {', '.join(map(str, loaded))}")
    return Rows(found, commit_of(loaded), path)


def require_columns(rows: "Dataset", wanted: Sequence[str], where: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        DataError: If one is not there, with the names of those that are.
    """
    for column in wanted:
        if column not in rows.column_names:
            found = ", ".join(f"`{name}`" for name in rows.column_names)
            hint = nearest(column, rows.column_names)
            hint = f"; {hint}" if hint.startswith("did") else ""
            raise DataError(f"{where}: no column `{column}`; its columns are {found}{hint}")


def cut_held_out(
    splits: Mapping[str, "Dataset"], key: Callable[[dict[str, Any]], str], wanted: Sequence[str] = HELD_OUT
) -> dict[str, "Dataset"]:
    """Cut the wanted splits that are missing from the train split, by the hash of each row's key.

    Args:
        splits: Rows by split; "train" must be there.
        key: The text of a row that decides its split: rows of the same text are never on both sides.
        wanted: The splits to have.
    """
    missing = [split for split in wanted if split not in splits]
    if not missing:
        return dict(splits)
    chosen: dict[str, list[int]] = {split: [] for split in ("train", *missing)}
    for index, split in enumerate(assign_splits(map(key, splits["train"]), missing)):
        chosen[split].append(index)
    return {**splits, **{split: splits["train"].select(indices) for split, indices in chosen.items()}}


def thinned(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most `limit` items, spread evenly over all: the same ones whatever the seed."""
    if limit is None or len(items) <= limit:
        return items
    return [items[number * len(items) // limit] for number in range(limit)]


def thin_rows(rows: "Dataset", limit: int | None) -> "Dataset":
    """At most `limit` rows, spread evenly over all."""
    return rows if limit is None or len(rows) <= limit else rows.select(thinned(range(len(rows)), limit))


def _files_by_split(local: Path) -> dict[str, list[Path]]:
    if local.is_file():
        if local.suffix.lower() not in TABLE_FORMATS:
            raise DataError(f"{local}: not a table; give a file with one of the suffixes {', '.join(TABLE_FORMATS)}")
        return {"train": [local]}
    files = {split: _tables_in(entries) for split, entries in entries_by_split(local).items()}
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
"""Share of the rows that may be left out. More is no bad row, but a wrong setting or a wrong file."""

PROBLEM = "problem"
"""Column of what is wrong with a row: empty, or `<what>: <which>`, counted by the first part."""


def without_problems(rows: "Dataset", where: str, notes: list[str]) -> "Dataset":
    """Leave out the rows that have a problem.

    Args:
        rows: With the column `problem`, which is taken away.
        where: What they are, in notes and errors.
        notes: Gets a line if any row is left out.

    Returns:
        The other rows, in their order.

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
