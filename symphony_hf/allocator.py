"""Settings of glibc's allocator for commands. It stands alone: whatever starts a process calls it first."""

import ctypes
import os
import platform

# Keep large blocks instead of returning them to the system at every step, which takes a large part of a step on CPU.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Set glibc's allocator: this process by a call, those that it starts by the environment they read at their start.

    Settings of the user's own are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ALLOCATOR):
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_M_MMAP_MAX, 0)
    glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # an int
    os.environ.update(_ALLOCATOR)
