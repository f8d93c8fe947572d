"""Copying of byte ranges from file to file, inside the kernel where the system can."""

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from symphony_hf.errors import CheckpointError

BLOCK = 2**20
"""Bytes read and written at a time: larger blocks were slower, smaller ones no faster."""

_CALL = 2**26
"""Maximum number of bytes of one system call, so that progress is shown and a signal is noticed."""

Transfer = Callable[[int, int, int, int], int]
"""Copies from a file descriptor to another: source, target, count, offset in the source. Returns the bytes copied."""


def copy_range(source: BinaryIO, offset: int, count: int, target: BinaryIO) -> Iterator[int]:
    """Append a range of bytes of one file to another.

    Args:
        source: File to read.
        offset: Position of the first byte.
        count: Number of bytes.
        target: Unbuffered file to write, at its end.

    Yields:
        The number of bytes copied by each call, 0 < n <= 64 MiB.

    Raises:
        CheckpointError: If the source has fewer bytes.
    """
    end = offset + count
    while offset < end:
        copied = _copy_some(source, offset, min(end - offset, _CALL), target)
        if not copied:
            raise CheckpointError(f"`{source.name}` became shorter while it was read")
        offset += copied
        yield copied


def _copy_some(source: BinaryIO, offset: int, count: int, target: BinaryIO) -> int:
    for transfer in _transfers():
        try:
            copied = transfer(source.fileno(), target.fileno(), count, offset)
        except OSError:  # between these two file systems it cannot; a real fault returns when the bytes are read
            continue
        if copied:
            return copied
    source.seek(offset)
    block = source.read(min(count, BLOCK))
    write_all(target, memoryview(block))
    return len(block)


def _transfers() -> Iterator[Transfer]:
    """Yield the system's calls that copy between files; both end at the source's end with 0."""
    if hasattr(os, "copy_file_range"):  # Linux
        yield lambda source, target, count, offset: os.copy_file_range(source, target, count, offset)
    if hasattr(os, "sendfile"):  # elsewhere than on Linux to sockets alone, which raises OSError
        yield lambda source, target, count, offset: os.sendfile(target, source, offset, count)


def write_all(file: BinaryIO, block: memoryview) -> None:
    """Write a block to an unbuffered file, whose `write` may stop early."""
    while len(block):
        block = block[file.write(block) :]
