"""The most memory that a stretch of a process took, as the kernel saw it: tensors' too, which Python does not see."""

import sys
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryPeak:
    """Within it, memory is watched. Linux alone tells the peak of a stretch; elsewhere `taken` stays 0.

    Attributes:
        taken: Bytes by which the process grew at most.
    """

    taken = 0

    def __enter__(self) -> "MemoryPeak":
        if sys.platform == "linux":
            _CLEAR.write_text("5")  # the peak is from here on
            self._before = _kilobytes("VmRSS")
        return self

    def __exit__(self, *error: Any) -> None:
        if sys.platform == "linux":
            self.taken = 1024 * max(0, _kilobytes("VmHWM") - self._before)


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {name}")
