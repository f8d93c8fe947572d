"""Detection of the command that wrote a folder, from its contents."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from symphony_hf.errors import ReportError, SymphonyError
from symphony_hf.files import UNFINISHED, read_object

from .quickstart import read_quickstart
from .read_evaluation import read_evaluation, read_routing
from .read_training import read_training_run
from .runs import Run


class _Reader(NamedTuple):
    """A kind of folder: its file, the key that tells it from others, and what reads it."""

    file: str
    key: str
    read: Callable[[Path, Mapping[str, Any]], Run]


_READERS = (
    _Reader("results.json", "recipe", read_training_run),
    _Reader("report.json", "arms", read_quickstart),
    _Reader("result.json", "models", read_evaluation),
    _Reader("result.json", "layers", read_routing),
)
_FILES = tuple(dict.fromkeys(reader.file for reader in _READERS))
_KINDS = (
    "the output folder of `symphony train` (results.json), `symphony quickstart` (report.json), `symphony eval` or "
    "`symphony routing` (result.json)"
)
_BEGUN = {
    UNFINISHED: "a training run that has not ended: go on with --resume_from_checkpoint true",
    "checkpoint-*": "a training run that has not ended: go on with --resume_from_checkpoint true",
    "final": "a training run that ended before its results were written: go on with --resume_from_checkpoint true",
    "cells/*.npz": "an evaluation that has not ended: the same `symphony eval` goes on where it was",
    "base/config.json": "a quickstart that has not ended: run it again",
}
"""What is there -> what it then is, without a file of results."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read folders that our commands wrote.

    Raises:
        ReportError: If there is none, or one is none of ours, or not whole.
        GraphError: If a run's graphs cannot be read.
    """
    if not folders:
        raise ReportError(f"report: no run was given: expected {_KINDS}")
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Run:
    files = _files_of(folder)
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise ReportError(f"report: `{folder}` holds {names}, of two commands: give each an output folder of its own")
    values = read_object(files[0], ReportError, hint="run its command again")
    for reader in _READERS:
        if reader.file == files[0].name and reader.key in values:
            try:
                return reader.read(folder, values)
            except SymphonyError:  # it names the file that is to blame
                raise
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ReportError(
                    f"report: `{files[0]}` has not what this version of symphony_hf writes ({error!r}): "
                    "run its command again"
                ) from error
    keys = " or ".join(f"`{reader.key}`" for reader in _READERS if reader.file == files[0].name)
    raise ReportError(f"report: `{files[0]}` is none of ours: it has no {keys}. Expected {_KINDS}")


def _files_of(folder: Path) -> list[Path]:
    """The files of results in a folder.

    Raises:
        ReportError: If there is none.
    """
    if not folder.exists():
        raise ReportError(f"report: `{folder}` does not exist: expected {_KINDS}")
    if not folder.is_dir():
        hint = f"give `{folder.parent}`, its folder" if folder.name in _FILES else f"expected {_KINDS}"
        raise ReportError(f"report: `{folder}` is a file: {hint}")
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if files:
        return files
    for pattern, what in _BEGUN.items():
        if any(folder.glob(pattern)):
            raise ReportError(f"report: `{folder}` is {what}")
    parent = folder.resolve().parent
    if any((parent / name).is_file() for name in _FILES):
        raise ReportError(f"report: `{folder}` is a part of a run: give `{parent}`, the whole")
    raise ReportError(f"report: `{folder}` is no run of ours: expected {_KINDS}")
