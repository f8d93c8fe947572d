"""Checkpoints of a run that survive a kill at any moment: finishing, finding, and deleting them.

A checkpoint is written in `_symphony_unfinished/` next to its final folder. It gets a record of its files, is flushed
to disk, and then renamed. A kill before that leaves the other checkpoints as they were. Deletion works the same way:
rename first, then delete.
"""

import contextlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from symphony_hf.errors import CheckpointError, ConfigError
from symphony_hf.files import (
    UNFINISHED,
    finish,
    foreign_files,
    place_to_write,
    remove_folder,
    remove_if_empty,
    write_json,
)

RECORD = "symphony_checkpoint.json"
"""Record of a complete checkpoint: its step, its run, its order in the folder, its batches, the sizes of its files."""

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OURS = re.compile(r"(checkpoint-\d+|final)(\.replaced|\.deleted)?")


def run_number(output: Path, resumed: Path | None) -> int:
    """Return the number of a run in its folder: that of the checkpoint that it resumes from, otherwise a new one.

    A run deletes only its own checkpoints, and is told from an earlier one in the folder by this number.
    """
    numbers = {folder.resolve(): record.get("run", 0) for folder, record in _records(output).items()}
    new = max(numbers.values(), default=-1) + 1
    return new if resumed is None else numbers.get(resumed.resolve(), new)


def run_of(folder: Path) -> int | None:
    """Return the number of the run that wrote a checkpoint; None without a record of the checkpoint."""
    record = read_record(folder)
    return None if record is None else record.get("run", 0)


def finish_checkpoint(
    target: Path,
    step: int,
    batches: Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
    run: int = 0,
    seconds: float | None = None,
) -> None:
    """Write the record of a checkpoint, with the batches and settings of its run, and give the checkpoint its name.

    `seconds` is how long the run took so far, including what came before it was resumed.
    """
    written = place_to_write(target)
    known = [record["order"] for record in _records(target.parent).values()]
    sizes = {file.relative_to(written).as_posix(): file.stat().st_size for file in _files(written)}
    record = {**batches, "step": step, "run": run, "order": max(known, default=0) + 1, "files": sizes}
    if settings is not None:
        record["settings"] = dict(settings)
    if seconds is not None:
        record["seconds"] = seconds
    write_json(written / RECORD, record)
    finish(target, _recorded(target))


def delete_oldest(output: Path, limit: int | None, keep: set[Path], run: int = 0) -> None:
    """Delete the oldest checkpoints of a run in a folder, down to `limit`, but none in `keep`.

    Called when the newest is complete. Age is the order of writing: the folder may have checkpoints with more steps,
    which the run wrote before it resumed from one with fewer. Without a limit, and without a record of a checkpoint,
    nothing is deleted.
    """
    if not limit or limit < 1:
        return
    records = {folder: record for folder, record in _records(output).items() if record.get("run", 0) == run}
    oldest_first = sorted(records, key=lambda folder: records[folder]["order"])
    surplus = len(oldest_first) - max(limit, len(keep & set(oldest_first)))
    for folder in [folder for folder in oldest_first if folder not in keep][: max(0, surplus)]:
        _delete(folder)
    remove_if_empty(output / UNFINISHED)


def _delete(folder: Path) -> None:
    """Delete a checkpoint that has a record; the files that its record does not name stay."""
    recorded = _recorded(folder)
    assert recorded is not None
    if foreign_files(folder, recorded):
        (folder / RECORD).unlink()  # first, so that the rest is not taken for a whole checkpoint
        for name in recorded - {RECORD}:
            (folder / name).unlink(missing_ok=True)
            remove_if_empty((folder / name).parent)
        return
    deleted = place_to_write(folder).with_name(f"{folder.name}.deleted")
    deleted.parent.mkdir(exist_ok=True)
    os.replace(folder, deleted)
    with contextlib.suppress(OSError):  # `clear_leftovers` removes it
        remove_folder(deleted)


def _recorded(folder: Path) -> set[str] | None:
    record = read_record(folder)
    return None if record is None else {RECORD, *record["files"]}


def clear_leftovers(output: Path) -> list[str]:
    """Remove unfinished folders of a killed run, restore what one was about to replace, and return the removed."""
    removed = []
    for folder in sorted((output / UNFINISHED).glob("*")):
        known = _OURS.fullmatch(folder.name)
        if known is None:
            continue
        if known[2] == ".replaced" and not (output / known[1]).exists():
            os.replace(folder, output / known[1])
            continue
        remove_folder(folder)
        removed.append(folder.name)
    remove_if_empty(output / UNFINISHED)
    return removed


def find_checkpoint(output: Path, wanted: Any) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from.

    Args:
        output: Output directory of the run.
        wanted: True for the checkpoint that was completed last, or a path. None and False mean none.

    Returns:
        The checkpoint or None, and messages about the choice.

    Raises:
        ConfigError: If `wanted` is none of these.
        CheckpointError: If the checkpoint at the path is not complete.
    """
    if wanted is None or wanted is False:
        records = _records(output)
        names = ", ".join(folder.name for folder in sorted(records, key=_step_of))
        found = (
            f"`{output}` has checkpoints of an earlier run ({names}). They are kept, except where this run saves at "
        )
        found += "the same step; `resume_from_checkpoint: true` would resume from the last"
        return None, [found] if records else []
    if wanted is True:
        return _last_whole(output)
    if not isinstance(wanted, str | os.PathLike):
        raise ConfigError(f"train: `resume_from_checkpoint` must be true, false or a path, got {wanted!r}")
    folder = Path(wanted)
    problem = problem_of(folder)
    if problem:
        raise CheckpointError(
            f"train: resume_from_checkpoint: `{folder}` is not a complete checkpoint: {problem}. Give another one, or "
            "`true` for the last complete one in the output directory"
        )
    return folder, [f"resuming from `{folder}`, {_age(folder)}"]


def _last_whole(output: Path) -> tuple[Path | None, list[str]]:
    problems = {folder: problem_of(folder, needs_record=True) for folder in _checkpoints(output)}
    notes = [f"`{folder}` is skipped: {problem}" for folder, problem in problems.items() if problem]
    records = {folder: record for folder, record in _records(output).items() if not problems[folder]}
    if not records:
        return None, [*notes, f"`{output}` has no complete checkpoint to resume from: starting from the beginning"]
    last = max(records, key=lambda folder: records[folder]["order"])
    return last, [*notes, f"resuming from `{last}`, {_age(last)}"]


def _age(folder: Path) -> str:
    return f"after {json.loads((folder / _STATE).read_text(encoding='utf-8'))['global_step']} steps"


def problem_of(folder: Path, *, needs_record: bool = False) -> str | None:
    """Return why a checkpoint is not complete; None if it is.

    A checkpoint without a record, written by a stock Trainer, counts as complete if Trainer's state, the last file that
    it writes, can be read, unless `needs_record` is set.
    """
    if not folder.is_dir():
        return "the folder does not exist"
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"`{_STATE}` is missing"
    except ValueError:
        return f"`{_STATE}` is truncated"
    record = read_record(folder)
    if record is None:
        unknown = f"`{RECORD}` is missing or truncated, so it may be incomplete; to use it anyway, give its path"
        return unknown if needs_record or (folder / RECORD).exists() else None
    for name, size in record["files"].items():
        file = folder / name
        if not file.is_file():
            return f"`{name}` is missing"
        if file.stat().st_size != size:
            return f"`{name}` has {file.stat().st_size:,} bytes of {size:,}"
    return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a checkpoint; None if there is none, or it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"step", "order", "files"} <= set(record) else None


def _checkpoints(output: Path) -> list[Path]:
    found = [folder for folder in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(folder.name)]
    return sorted((folder for folder in found if folder.is_dir()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _records(output: Path) -> dict[Path, dict[str, Any]]:
    records = {folder: read_record(folder) for folder in _checkpoints(output)}
    return {folder: record for folder, record in records.items() if record is not None}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def reporting_failed_save(target: Path) -> Iterator[None]:
    """Turn a failed write, as on a full disk, into a CheckpointError of one line, and remove what was written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        frames = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, RuntimeError) and "torch.serialization" not in frames:
            raise  # only torch.save raises it for a failed write, with varying texts
        free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
        shutil.rmtree(place_to_write(target), ignore_errors=True)
        remove_if_empty(target.parent / UNFINISHED)
        last, _ = _last_whole(target.parent)
        remedy = f"resume from `{last}`, which is complete" if last else "start again: there is no earlier checkpoint"
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"`{target}` could not be written; the disk had {free / 2**30:.1f} GiB free. Free space, then {remedy} "
            f"({reason})"
        ) from error
