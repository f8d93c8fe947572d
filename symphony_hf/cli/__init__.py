"""The command `symphony`, one file a theme."""

import importlib
import os
import sys

from symphony_hf.errors import SymphonyError

from .app import app

__all__ = ["app", "main"]

for _theme in ("train", "convert", "evaluate", "experiments"):
    importlib.import_module(f".{_theme}", __name__)

# Large blocks are kept instead of handed back to the system at every step; on CPU this is a large part of a step.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def _restart_with_allocator_settings() -> None:
    """glibc reads its settings when a process starts, so start this command once more with them."""
    if sys.platform != "linux" or any(name in os.environ for name in _ALLOCATOR):
        return
    os.execve(sys.executable, [sys.executable, "-m", "symphony_hf.cli", *sys.argv[1:]], {**os.environ, **_ALLOCATOR})


def main() -> None:
    """The console script: errors of ours are one line, not a traceback."""
    if not {"-h", "--help"} & set(sys.argv):
        _restart_with_allocator_settings()
    try:
        app()
    except SymphonyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
