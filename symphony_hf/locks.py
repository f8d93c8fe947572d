"""Locks of folders against other processes, as far as the file system has locks."""

import contextlib
import errno
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import CheckpointError

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of `flock` on file systems without locks, such as some mounts of NFS and Lustre."""

_opened: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Close a forked process's copies of locks: a worker that outlives its killed parent would keep them."""
    for file in list(_opened):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def locked(lock: Path, target: Path) -> Iterator[None]:
    """Lock a file until the block or this process ends. Where there are no locks, the block runs without one.

    Args:
        lock: The file. It is created, and removed in the end, with its folder if that is empty.
        target: Folder that it stands for.

    Raises:
        CheckpointError: If another process has the lock.
    """
    with contextlib.ExitStack() as files:
        is_locked = os.name == "posix" and _lock(lock, target, files)
        try:
            yield
        finally:
            if is_locked:
                lock.unlink(missing_ok=True)  # before it is closed: who has opened it will find it removed
                with contextlib.suppress(OSError):  # the folder has files
                    lock.parent.rmdir()


def _lock(lock: Path, target: Path, files: contextlib.ExitStack) -> bool:
    """Create and lock a file, to be closed with `files`. Return False on a file system without locks."""
    import fcntl

    for tries_left in reversed(range(100)):  # another process may remove it, or its folder, between our steps
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = files.enter_context(lock.open("w"))
            _opened.add(file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return True
        except BlockingIOError:
            break
        except (FileNotFoundError, FileExistsError):
            if not tries_left:
                raise
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            lock.unlink(missing_ok=True)
            return False
    raise CheckpointError(
        f"another process is writing `{target}`: try again when it has finished, or if it is another rank of this "
        "job, write on one rank alone"
    )
