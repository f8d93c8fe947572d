"""The command `symphony`, one file per theme."""

import ctypes
import importlib
import os
import platform
import sys

from symphony_hf.errors import SymphonyError, one_line

from .app import app

__all__ = ["app", "main"]

for _theme in ("train", "convert", "evaluate", "experiments"):
    importlib.import_module(f".{_theme}", __name__)

# Keep large blocks instead of returning them to the system at every step, which takes a large part of a step on CPU.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _keep_freed_memory() -> None:
    """Set glibc's allocator: this process by a call, those that it starts by the environment they read at their start.

    Settings of the user's own are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ALLOCATOR):
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_M_MMAP_MAX, 0)
    glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # an int
    os.environ.update(_ALLOCATOR)


def main() -> None:
    """Run the console script. Errors of this package are printed in one line, without a traceback."""
    _keep_freed_memory()
    try:
        app()
    except SymphonyError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
