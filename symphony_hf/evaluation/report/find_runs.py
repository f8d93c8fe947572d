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
    """A kind of output folder: its file, the key that identifies it, and its reader."""

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
    UNFINISHED: "an unfinished training run: continue it with --resume_from_checkpoint true",
    "checkpoint-*": "an unfinished training run: continue it with --resume_from_checkpoint true",
    "final": "a training run without results: continue it with --resume_from_checkpoint true",
    "cells/*.npz": "an unfinished evaluation: the same `symphony eval` continues it",
    "base/config.json": "an unfinished quickstart: run it again",
}
"""Description of a folder without results, by a pattern of its files."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read output folders of commands.

    Raises:
        ReportError: If there are none, or one is not an output folder of a command, or is incomplete.
        GraphError: If a run's graphs cannot be read.
    """
    if not folders:
        raise ReportError(f"report: no run was given: expected {_KINDS}")
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Run:
    files = _files_of(folder)
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise ReportError(f"report: `{folder}` has {names}, results of two commands: use an output folder for each")
    values = read_object(files[0], ReportError, hint="run its command again")
    for reader in _READERS:
        if reader.file == files[0].name and reader.key in values:
            try:
                return reader.read(folder, values)
            except SymphonyError:  # it names the file
                raise
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ReportError(
                    f"report: `{files[0]}` does not have what this version of symphony_hf writes ({error!r}): "
                    "run its command again"
                ) from error
    keys = " or ".join(f"`{reader.key}`" for reader in _READERS if reader.file == files[0].name)
    raise ReportError(f"report: `{files[0]}` is not a result of symphony_hf: it has no {keys}. Expected {_KINDS}")


def _files_of(folder: Path) -> list[Path]:
    """Return the result files in a folder, or raise ReportError if there are none."""
    if not folder.exists():
        raise ReportError(f"report: `{folder}` does not exist: expected {_KINDS}")
    if not folder.is_dir():
        hint = f"give its folder, `{folder.parent}`" if folder.name in _FILES else f"expected {_KINDS}"
        raise ReportError(f"report: `{folder}` is a file: {hint}")
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if files:
        return files
    for pattern, what in _BEGUN.items():
        if any(folder.glob(pattern)):
            raise ReportError(f"report: `{folder}` is {what}")
    parent = folder.resolve().parent
    if any((parent / name).is_file() for name in _FILES):
        raise ReportError(f"report: `{folder}` is part of a run: give its folder, `{parent}`")
    raise ReportError(f"report: `{folder}` is not a run of symphony_hf: expected {_KINDS}")
