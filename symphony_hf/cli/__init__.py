"""The command `symphony`, one file per theme."""

import importlib
import sys

from symphony_hf.allocator import keep_freed_memory
from symphony_hf.errors import SymphonyError, one_line

from .app import app

__all__ = ["app", "main"]

for _theme in ("train", "convert", "evaluate", "experiments"):
    importlib.import_module(f".{_theme}", __name__)


def main() -> None:
    """Run the console script. Errors of this package are printed in one line, without a traceback."""
    keep_freed_memory()
    try:
        app()
    except SymphonyError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
