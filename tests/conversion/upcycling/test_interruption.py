"""Killed at any moment, a run leaves no folder that looks complete and is not; the next run goes through."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import pytest
from dense import files_of, load, run, save_dense

from symphony_hf import CheckpointError
from symphony_hf.conversion.upcycling.plan import PlannedTensor
from symphony_hf.conversion.upcycling.writing import Shards

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
KILLS = 8


def forked(work):
    """Run a function in a process of its own, and return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def kill_before(number, folder, counted=None):
    """Kill this process before one of its operations on files in a folder; 0 only counts them."""
    count = 0

    def note(event, arguments):
        nonlocal count
        if event in EVENTS and str(arguments[0]).startswith(f"{folder}/"):
            count += 1
            if counted is not None:
                counted.value = count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)


@pytest.mark.thorough
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
def test_kill_9_at_any_moment(replaces, tmp_path):
    _, source = save_dense(tmp_path / "dense", num_hidden_layers=2)
    options = {"max_shard_size": "40KB", "overwrite": True}
    work = tmp_path / "work"
    work.mkdir()
    target = work / "moe"
    run(source, tmp_path / "old", num_experts=2)
    run(source, tmp_path / "new", **options)
    old, new = files_of(tmp_path / "old"), files_of(tmp_path / "new")

    def begin():
        if replaces and not target.exists():
            run(source, target, num_experts=2)

    def upcycle_until(number, counted=None):
        kill_before(number, tmp_path, counted)
        run(source, target, **options)

    begin()
    counted = multiprocessing.get_context("fork").Value("i", 0)
    assert forked(lambda: upcycle_until(0, counted)) == 0
    total = counted.value
    assert total > 3 * KILLS
    # Everywhere, and at each of the last operations, where the folder gets its name.
    moments = sorted({*random.Random(0).sample(range(1, total), KILLS), *range(total - 8, total + 1)})
    seen = set()
    for moment in moments:
        run(source, target, overwrite=True, num_experts=2) if replaces else remove(target)
        assert forked(lambda moment=moment: upcycle_until(moment)) == -signal.SIGKILL
        found = files_of(target)
        assert found in ([{}, new, old] if replaces else [{}, new]), moment
        seen.add("new" if found == new else "old" if found == old else "none")
    assert seen >= ({"old", "new"} if replaces else {"none", "new"})
    run(source, target, **options)
    assert files_of(work) == {f"moe/{name}": content for name, content in new.items()}
    load(target)


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink()
    if folder.exists():
        folder.rmdir()


def test_a_disk_that_is_full_after_all(tmp_path):
    """No file may grow beyond 30 KB here; the system then refuses as it does on a full disk."""
    _, source = save_dense(tmp_path / "dense")
    before = files_of(tmp_path)

    def work():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=r"could not be written: .*; nothing of it was kept"):
            run(source, tmp_path / "moe")

    assert forked(work) == 0
    assert files_of(tmp_path) == before
    assert not (tmp_path / "moe").exists()


def test_an_error_in_one_file_ends_the_others(tmp_path):
    """Some are written side by side: the second fails once another has begun, whose tensor would be long."""
    begun, written = threading.Event(), []

    class Failing:
        def blocks(self, tensor):
            if tensor.name == "b":
                assert begun.wait(60)
                raise OSError("no space")
            for _ in range(100_000):
                begun.set()
                written.append(tensor.name)
                yield memoryview(bytes(8))
                time.sleep(0.001)

    shards = Shards([PlannedTensor(name, (200_000,), "F32") for name in "abcdefgh"], "900KB")
    assert len(shards.split.filename_to_tensors) == 8
    with pytest.raises(OSError, match="no space"):
        shards.write(tmp_path, Failing())
    assert 0 < len(written) < 100_000
    assert "h" not in written  # one that had not begun does not begin
