"""Folders that have their name only once they are whole: checkpoints, and the trained model.

A folder is written in `_symphony_unfinished/`, beside its place. A checkpoint gets a record of its files, all is
flushed to the disk, and then it is renamed. Whatever kills the process before that leaves the folders that had their
names as they were. What takes a folder's name away works the same way: rename first, then delete.
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
from symphony_hf.files import UNFINISHED, finish, foreign_files, place_to_write, remove_if_empty, write_json

RECORD = "symphony_checkpoint.json"
"""What a checkpoint is whole by: its step, its place among its run's checkpoints, the sizes of its files."""

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OURS = re.compile(r"(checkpoint-\d+|final)(\.replaced|\.deleted)?")


def finish_checkpoint(target: Path, step: int, num_processes: int, settings: Mapping[str, Any] | None = None) -> None:
    """`finish` for a checkpoint, with the record that it is known to be whole by, and its run's settings."""
    written = place_to_write(target)
    known = [record["order"] for record in _records(target.parent).values()]
    sizes = {file.relative_to(written).as_posix(): file.stat().st_size for file in _files(written)}
    record = {"step": step, "order": max(known, default=0) + 1, "processes": num_processes, "files": sizes}
    if settings is not None:
        record["settings"] = dict(settings)
    write_json(written / RECORD, record)
    finish(target, _recorded(target))


def delete_oldest(output: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest of our checkpoints in a folder, down to `limit` (none: all stay), but never one of `keep`.

    Called when the newest is whole. Old is what was written first: a folder may hold an earlier run's, of more steps.
    """
    if not limit or limit < 1:
        return
    records = _records(output)
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
    shutil.rmtree(deleted, ignore_errors=True)


def _recorded(folder: Path) -> set[str] | None:
    record = read_record(folder)
    return None if record is None else {RECORD, *record["files"]}


def clear_leftovers(output: Path) -> list[str]:
    """Remove what a run that was killed while it saved left unfinished; only what has a name that we give.

    Returns:
        The names of what was removed.
    """
    removed = []
    for folder in sorted((output / UNFINISHED).glob("*")):
        known = _OURS.fullmatch(folder.name)
        if known is None:
            continue
        if known[2] == ".replaced" and not (output / known[1]).exists():
            os.replace(folder, output / known[1])
            continue
        shutil.rmtree(folder)
        removed.append(folder.name)
    remove_if_empty(output / UNFINISHED)
    return removed


def find_checkpoint(output: Path, wanted: Any) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from.

    Args:
        output: The run's folder.
        wanted: True: the one that was completed last; a path: that one; None or False: none.

    Returns:
        The checkpoint, or None, and what there is to say about the choice.

    Raises:
        ConfigError: If `wanted` is none of these.
        CheckpointError: If the checkpoint at the path is not whole.
    """
    if wanted is None or wanted is False:
        records = _records(output)
        names = ", ".join(sorted((folder.name for folder in records), key=_step))
        again = f"`{output}` has checkpoints of an earlier run ({names}), and they stay; `resume_from_checkpoint: true`"
        return None, [f"{again} would go on from the last"] if records else []
    if wanted is True:
        return _last_whole(output)
    if not isinstance(wanted, str | os.PathLike):
        raise ConfigError(f"train: `resume_from_checkpoint` must be true, false or a path, got {wanted!r}")
    folder = Path(wanted)
    problem = problem_of(folder)
    if problem:
        raise CheckpointError(
            f"train: resume_from_checkpoint: `{folder}` is not a whole checkpoint: {problem}. Give another one, or "
            "`true` for the last whole one of the output directory"
        )
    return folder, [f"resuming from `{folder}`, {_age(folder)}"]


def _last_whole(output: Path) -> tuple[Path | None, list[str]]:
    problems = {folder: problem_of(folder, needs_record=True) for folder in _checkpoints(output)}
    notes = [f"`{folder}` is passed over: {problem}" for folder, problem in problems.items() if problem]
    records = {folder: record for folder, record in _records(output).items() if not problems[folder]}
    if not records:
        return None, [*notes, f"`{output}` has no whole checkpoint to resume from: starting from the beginning"]
    last = max(records, key=lambda folder: records[folder]["order"])
    return last, [*notes, f"resuming from `{last}`, {_age(last)}"]


def _age(folder: Path) -> str:
    return f"after {json.loads((folder / _STATE).read_text(encoding='utf-8'))['global_step']} steps"


def problem_of(folder: Path, *, needs_record: bool = False) -> str | None:
    """Why a checkpoint is not whole; None when it is.

    One without our record, written by a bare Trainer, counts as whole if Trainer's state, the last file that it
    writes, can be read; unless `needs_record`.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"`{_STATE}` is missing"
    except ValueError:
        return f"`{_STATE}` is cut off"
    record = read_record(folder)
    if record is None:
        unknown = f"`{RECORD}` is missing or cut off, so nothing says that it is whole; to use it, give its path"
        return unknown if needs_record or (folder / RECORD).exists() else None
    for name, size in record["files"].items():
        file = folder / name
        if not file.is_file():
            return f"`{name}` is missing"
        if file.stat().st_size != size:
            return f"`{name}` has {file.stat().st_size:,} bytes of {size:,}"
    return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's record; None if it has none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"step", "order", "files"} <= set(record) else None


def _checkpoints(output: Path) -> list[Path]:
    found = [folder for folder in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(folder.name)]
    return sorted((folder for folder in found if folder.is_dir()), key=lambda folder: _step(folder.name))


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _records(output: Path) -> dict[Path, dict[str, Any]]:
    records = {folder: read_record(folder) for folder in _checkpoints(output)}
    return {folder: record for folder, record in records.items() if record is not None}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def reporting_failed_save(target: Path) -> Iterator[None]:
    """Make a write that fails, on a full disk say, one line that says what is left; and remove what was written.

    Raises:
        CheckpointError: In place of what the writers raise: OSError, or safetensors' or torch's own.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        frames = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, RuntimeError) and "torch.serialization" not in frames:
            raise  # only torch.save raises it for a write that failed, with one text or another
        free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
        shutil.rmtree(place_to_write(target), ignore_errors=True)
        remove_if_empty(target.parent / UNFINISHED)
        last, _ = _last_whole(target.parent)
        remedy = f"resume from `{last}`, which is whole" if last else "start again: there is no earlier checkpoint"
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"`{target}` could not be written; the disk had {free / 2**30:.1f} GiB free. Make room, then {remedy} "
            f"({reason})"
        ) from error
