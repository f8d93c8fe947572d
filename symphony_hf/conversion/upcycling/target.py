"""The folder that an upcycled checkpoint goes to: it may, there is room, and it is whole or it is not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from symphony_hf.errors import CheckpointError, UpcycleError
from symphony_hf.files import place_to_write, remove_if_empty, replacing_folder


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that would harm something.

    Raises:
        UpcycleError: If it exists and may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UpcycleError(f"upcycle: the target `{target}` is a file: give a folder")
    if any(target.iterdir()) and not overwrite:
        raise UpcycleError(f"upcycle: the target `{target}` exists: give another one, or overwrite it")
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise UpcycleError(f"upcycle: the target `{target}` holds no model, so it is not overwritten: give another one")


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target that would harm the source.

    Raises:
        UpcycleError: If it is in the source, or the source in it.
    """
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UpcycleError(f"upcycle: the target `{target}` and the source `{source}` must not be in one another")


def check_room(target: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        target: What will be written; what it replaces is deleted only after that.
        needed: Its bytes.

    Raises:
        CheckpointError: If there is less.
    """
    free = shutil.disk_usage(_nearest_folder(target)).free
    if free < needed:
        raise CheckpointError(
            f"upcycle: `{target}` needs {needed / 1e9:,.2f} GB, and its disk has {free / 1e9:,.2f} GB free: make room, "
            "or give a target on another disk"
        )


@contextlib.contextmanager
def writing(target: Path, command: str = "upcycle") -> Iterator[Path]:
    """Write a folder that has its name only once it is whole; nothing of it stays if an error is raised within.

    What a killed process left of the same target is removed first.

    Args:
        target: The folder.
        command: That writes it, for error messages.

    Yields:
        Where to write.

    Raises:
        CheckpointError: If the disk is full after all, or another process writes the same target.
    """
    try:
        with _alone(target, command), replacing_folder(target) as folder:
            yield folder
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{command}: `{target}` could not be written ({error}); nothing of it was kept"
        ) from error


@contextlib.contextmanager
def _alone(target: Path, command: str) -> Iterator[None]:
    """Keep other processes from writing the same target; whatever ends this one lets them."""
    lock = place_to_write(target).with_name(f"{target.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"{command}: another process is writing `{target}`") from error
        try:
            yield
        finally:
            lock.unlink()
            remove_if_empty(lock.parent)


def _nearest_folder(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
