"""Byte ranges are the same however they are copied: by either of the system's calls, or through memory."""

import errno
import os

import pytest
from dense import save_dense

from symphony_hf import CheckpointError
from symphony_hf.conversion.upcycling import copying
from symphony_hf.conversion.upcycling.copying import copy_range, write_all
from symphony_hf.conversion.upcycling.upcycle import upcycle

CALLS = ("copy_file_range", "sendfile")
needs_calls = pytest.mark.skipif(not all(hasattr(os, call) for call in CALLS), reason="Linux has both calls")


def refuse(*args, **kwargs):
    raise OSError(errno.EXDEV, "between these file systems it cannot")


def copied(folder, offset, count):
    with (folder / "source").open("rb", buffering=0) as source, (folder / "target").open("wb", buffering=0) as target:
        write_all(target, memoryview(b"head"))
        assert sum(copy_range(source, offset, count, target)) == count
        write_all(target, memoryview(b"tail"))
    return (folder / "target").read_bytes()


@pytest.fixture
def content(tmp_path):
    content = os.urandom(3 * 2**20 + 17)
    (tmp_path / "source").write_bytes(content)
    return content


@needs_calls
@pytest.mark.parametrize("refused", [(), CALLS[:1], CALLS], ids=["copy_file_range", "sendfile", "memory"])
@pytest.mark.parametrize("is_missing", [False, True])
def test_every_way_copies_the_range(refused, is_missing, content, tmp_path, monkeypatch):
    for call in refused:
        monkeypatch.delattr(os, call) if is_missing else monkeypatch.setattr(os, call, refuse)
    for offset, count in ((0, len(content)), (5, 2**21 + 1), (len(content) - 1, 1), (9, 0)):
        assert copied(tmp_path, offset, count) == b"head" + content[offset : offset + count] + b"tail"


@needs_calls
def test_calls_that_stop_early_are_repeated(content, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "_CALL", 1000)
    assert copied(tmp_path, 3, 12_345) == b"head" + content[3 : 3 + 12_345] + b"tail"


@needs_calls
@pytest.mark.parametrize("refused", [(), CALLS], ids=["calls", "memory"])
def test_a_source_that_became_shorter_is_told(refused, content, tmp_path, monkeypatch):
    for call in refused:
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match="source` became shorter while it was read"):
        copied(tmp_path, len(content) - 10, 11)


@needs_calls
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_upcycling_writes_the_same_bytes(kind, tmp_path, monkeypatch):
    _, source = save_dense(tmp_path / "dense", kind)
    upcycle(source, tmp_path / "fast", check=False, max_shard_size="60KB")
    for call in CALLS:
        monkeypatch.setattr(os, call, refuse)
    upcycle(source, tmp_path / "slow", check=False, max_shard_size="60KB")
    fast, slow = (
        {file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir())} for name in ("fast", "slow")
    )
    assert len(fast) > 3
    assert fast == slow
