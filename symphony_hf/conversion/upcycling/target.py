"""The output folder of a conversion: checks before writing, and writing as a whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from symphony_hf.errors import CheckpointError, UpcycleError
from symphony_hf.files import replacing_folder
from symphony_hf.results import check_folder_place


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that cannot be written, or exists, unless it is a model that may be overwritten.

    Raises:
        ConfigError: If it cannot be written or replaced.
        UpcycleError: If it exists and may not be replaced.
    """
    check_folder_place(target, "upcycle")
    if not target.exists():
        return
    if any(target.iterdir()) and not overwrite:
        raise UpcycleError(f"upcycle: the target `{target}` exists: give another one, or overwrite it")
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise UpcycleError(f"upcycle: the target `{target}` holds no model, so it is not overwritten: give another one")


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target inside the source, or around it.

    Raises:
        UpcycleError: If one contains the other.
    """
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UpcycleError(f"upcycle: the target `{target}` and the source `{source}` must not be in one another")


def check_room(target: Path, needed: int) -> None:
    """Check that the disk has room for the target.

    Args:
        target: Folder to write. A folder that it replaces is deleted only afterwards.
        needed: Bytes of the target.

    Raises:
        CheckpointError: If the disk has fewer bytes free.
    """
    free = shutil.disk_usage(_nearest_folder(target)).free
    if free < needed:
        raise CheckpointError(
            f"upcycle: `{target}` needs {needed / 1e9:,.2f} GB, and its disk has {free / 1e9:,.2f} GB free: make room, "
            "or give a target on another disk"
        )


@contextlib.contextmanager
def writing(target: Path, command: str = "upcycle") -> Iterator[Path]:
    """Write a folder that appears only once it is complete; nothing of it stays if the block raises.

    Leftovers of a killed process are removed first. Yields the folder to write to.

    Raises:
        CheckpointError: If writing fails, or another process is writing the same target.
    """
    try:
        with replacing_folder(target) as folder:
            yield folder
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"`{error.filename or target}`: {error.strerror or error}"  # it may be a file that was read
        raise CheckpointError(
            f"{command}: `{target}` could not be written: {reason}; nothing of it was kept"
        ) from error


def _nearest_folder(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
