"""Progress bars of the `datasets` library, which are on or off for the whole process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Have its bars only where they are wanted and a terminal shows them, and leave the switch as it was."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (shown and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
