"""The command keeps freed memory instead of returning it to the system, unless the user's settings say otherwise."""

import inspect
import os
import platform
import runpy
import subprocess
import sys

import pytest

from symphony_hf import allocator

# The resident memory that is left after a large block was freed. In a process of its own, because the settings stay.
_LEFT = """
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
size = 256 * 2**20
before = resident()
block = libc.malloc(size)
ctypes.memset(block, 1, size)
libc.free(block)
print(resident() - before)
"""


def left(**settings):
    function = inspect.getsource(allocator.keep_freed_memory)  # by itself: the package's import takes seconds
    constants = "\n".join(
        f"{name} = {getattr(allocator, name)}" for name in ("_ALLOCATOR", "_M_TRIM_THRESHOLD", "_M_MMAP_MAX")
    )
    code = f"import ctypes, os, platform\n{constants}\n{function}\nkeep_freed_memory()\n{_LEFT}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc, read from /proc"
)
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    assert left() > 200 * 2**20
    assert left(MALLOC_MMAP_THRESHOLD_="65536") < 50 * 2**20


def test_started_processes_inherit_the_settings(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr("ctypes.CDLL", lambda _: type("Glibc", (), {"mallopt": staticmethod(lambda *_: 1)}))
    allocator.keep_freed_memory()
    assert os.environ == allocator._ALLOCATOR


def test_training_by_a_launcher_keeps_freed_memory_too(monkeypatch):
    """`python -m symphony_hf.train`, which accelerate starts."""
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    monkeypatch.delitem(sys.modules, "symphony_hf.train", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("symphony_hf.train", run_name="__main__")
    assert calls == [1]
