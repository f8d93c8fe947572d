"""Folders with a command's results, which an earlier run may have written: what a new run may replace."""

from collections.abc import Collection, Iterable
from pathlib import Path

from .errors import ConfigError
from .files import check_file_place, read_object


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

    The result accounts for the others: it is removed last, and nothing is without it. See `check_results` for `keys`.
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
