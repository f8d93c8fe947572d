"""Results of commands: where they can be written, and which earlier ones a new run may replace."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from .errors import ConfigError
from .files import read_object


def check_file_place(path: str | Path, command: str) -> None:
    """Check that a result file can be written, before the work that produces it, or raise ConfigError."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{command}: `{path}` is a folder, and the result is a file: give its name, too")
    check_folder_of(path, command)


def check_folder_place(path: Path, command: str) -> None:
    """Check that a folder can be written, or replaced as a whole, or raise ConfigError."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{command}: `{path}` is a file, and the result is a folder: give another place")
    place = path.resolve()
    is_fixed = Path.cwd().is_relative_to(place) or (place.exists() and not os.access(place.parent, os.W_OK))
    if is_fixed or any(os.path.ismount(folder) for folder, _, _ in os.walk(place)):
        raise ConfigError(
            f"{command}: `{path}` cannot be replaced as a whole: it is or holds a disk or the current folder, or it is "
            "in a read-only folder. Give a folder in it"
        )
    check_folder_of(place, command)


def check_folder_of(path: Path, command: str) -> None:
    """Check that files can be created beside a path: raise ConfigError if its nearest parent is a file or read-only."""
    nearest = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not nearest.is_dir():
        raise ConfigError(f"{command}: `{path}` cannot be written, because `{nearest}` is a file: give another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{command}: `{path}` cannot be written: no permission for `{nearest}`; give another place")


def check_results(result: Path, others: Iterable[str], command: str, keys: Collection[str] = ()) -> None:
    """Refuse a folder in which a command's results would replace files that no earlier run of it wrote.

    Args:
        result: JSON file that the command writes. If an earlier run wrote it, the others are that run's.
        others: Names of the other files that the command writes beside it.
        command: Name of the command.
        keys: Keys by which the file is known as the command's; by default, it must say our version in `versions`.

    Raises:
        ConfigError: If a file there is not the command's, or no file can be written there.
    """
    check_file_place(result, command)
    found = ", ".join(f"`{name}`" for name in (result.name, *others) if (result.parent / name).exists())
    if found and not _is_result(result, keys):
        raise ConfigError(
            f"{command}: `{result.parent}` has {found}, which no run of symphony_hf wrote with this command "
            "and this one would replace: move what is there, or give another folder"
        )


def remove_results(result: Path, others: Iterable[str], keys: Collection[str] = ()) -> None:
    """Remove the files of an earlier run, so that its numbers never stand beside another model's.

    The result marks the other files as ours, so it is removed last, and they never exist without it. See
    `check_results` for `keys`.
    """
    if _is_result(result, keys):
        for name in (*others, result.name):
            (result.parent / name).unlink(missing_ok=True)


def _is_result(file: Path, keys: Collection[str] = ()) -> bool:
    """Whether a JSON file has these keys; without any, whether it says which version of this package wrote it."""
    try:
        values = read_object(file, ConfigError)
    except ConfigError:
        return False
    if keys:
        return set(keys) <= values.keys()
    versions = values.get("versions")
    return isinstance(versions, dict) and "symphony_hf" in versions
