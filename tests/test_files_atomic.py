"""Files that have their name only once they are whole, and places that are refused before the work."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from symphony_hf.errors import CheckpointError, ConfigError
from symphony_hf.experiments.conformance.table import write_readme
from symphony_hf.files import replacing, replacing_folder, write_json, write_text
from symphony_hf.locks import locked
from symphony_hf.results import check_file_place, check_folder_place
from symphony_hf.training.report import write_run_report


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_beside_its_place(tmp_path):
    file = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with replacing(file) as written:
            written.write_text(content)
            assert written.parent == file.parent
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == content
        assert names(file.parent) == ["file.txt"]


def test_what_fails_leaves_the_old_file_alone(tmp_path, disk_that_fills):
    file = tmp_path / "file.txt"
    file.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new")
    with pytest.raises(FileNotFoundError), replacing(file):
        pass  # nothing was written
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_two_processes_do_not_write_into_each_other_s_file(tmp_path):
    """Also of one number, in containers that share the folder."""
    with replacing(tmp_path / "file") as one:
        with replacing(tmp_path / "file") as other:
            one.write_text("one")
            other.write_text("other")
        assert (tmp_path / "file").read_text() == "other"
    assert (tmp_path / "file").read_text() == "one"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_two_processes_do_not_write_one_folder(tmp_path):
    target = tmp_path / "model"
    with replacing_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"another process is writing `.*model`"), replacing_folder(target):
            raise AssertionError("the second one began")
        with replacing_folder(tmp_path / "other") as other:
            (other / "config.json").write_text("{}")
    assert names(tmp_path) == ["model", "other"]
    assert names(target) == ["config.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from symphony_hf.locks import locked
with locked(Path(sys.argv[1]), Path("model")):
    if os.fork() == 0:
        print("forked", flush=True)
        sys.stdin.read()
        os._exit(0)
    signal.pause()
"""


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_a_killed_process_leaves_no_lock_to_what_it_has_forked(tmp_path):
    """A worker of a loader, for example, which lives on for seconds."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"forked\n"
        with pytest.raises(CheckpointError, match="another process"), locked(tmp_path / "lock", tmp_path):
            raise AssertionError("it was not locked")
        process.kill()
        process.wait()
        with locked(tmp_path / "lock", tmp_path):
            pass
        process.stdin.close()  # the forked process ends


@pytest.mark.skipif(os.name != "posix", reason="locks")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_to(number, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    for name in ("one", "other"):
        with replacing_folder(tmp_path / "model") as folder:
            (folder / name).touch()
    assert names(tmp_path / "model") == ["one", "other"]
    assert names(tmp_path) == ["model"]


@pytest.mark.skipif(os.name != "posix", reason="locks")
@pytest.mark.parametrize("remove", [Path.unlink, lambda lock: shutil.rmtree(lock.parent)], ids=["file", "folder"])
def test_a_lock_that_another_process_removes_is_taken_again(remove, tmp_path, monkeypatch):
    """It ends between our opening of the file and our lock on it."""
    import fcntl

    target, flock, calls = tmp_path / "model", fcntl.flock, []

    def slow_flock(file, operation):
        if not calls:
            remove(Path(file.name))
        calls.append(file)
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", slow_flock)
    with replacing_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="try again when it has finished"), replacing_folder(target):
            raise AssertionError("the second one began")
    assert len(calls) == 3
    assert names(tmp_path) == ["model"]


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_parent_that_is_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    with pytest.raises(FileExistsError), replacing_folder(tmp_path / "runs" / "model"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_that_is_replaced_leaves_what_it_points_to(tmp_path):
    stored, target = tmp_path / "storage", tmp_path / "final"
    stored.mkdir()
    (stored / "theirs.txt").write_text("theirs")
    target.symlink_to(stored)
    for _ in range(2):
        with replacing_folder(target) as folder:
            (folder / "config.json").write_text("{}")
        assert (target / "config.json").exists()
        assert names(tmp_path) == ["final", "storage"]
    assert names(stored) == ["theirs.txt"]


def test_text_and_json(tmp_path):
    write_text(tmp_path / "page.md", "ü\n")
    write_json(tmp_path / "values.json", {"b": 1, "a": [2.5]})
    assert (tmp_path / "page.md").read_bytes() == "ü\n".encode()
    assert (tmp_path / "values.json").read_text() == '{\n  "a": [\n    2.5\n  ],\n  "b": 1\n}\n'
    assert names(tmp_path) == ["page.md", "values.json"]


RESULTS = {
    "recipe": {"data": {"path": None}},
    "command": "",
    "train": {},
    "test": {"loss": 1.0},
    "best_checkpoint": None,
    "parameters": {"total": 1, "trained": 1},
    "processes": 1,
    "strategy": "single",
    "device": "cpu",
    "data": {"revision": "0", "notes": []},
    "seeds": {"training": 0},
    "versions": {"torch": "2"},
}


@pytest.mark.parametrize(
    "write",
    [lambda page: write_readme(page, []), lambda page: write_run_report(RESULTS, page.parent)],
    ids=["table of families", "report of a run"],
)
def test_a_full_disk_leaves_the_page_as_it_was(write, tmp_path, disk_that_fills):
    page = tmp_path / "report.md"
    old = "Words.\n<!-- families table -->\n<!-- end -->\nMore words.\n"
    page.write_bytes(old.encode())
    with pytest.raises(OSError, match="No space left"):
        write(page)
    assert page.read_text() == old
    assert names(tmp_path) == ["report.md"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("folder", r"bench: `.*folder` is a folder, and the result is a file: give its name, too"),
        ("file/result.json", r"bench: `.*result\.json` cannot be written, because `.*file` is a file"),
        ("file/deeper/result.json", r"because `.*file` is a file"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused(place, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=message):
        check_file_place(tmp_path / place, "bench")
    for good in ("file", "new.json", "folder/new.json", "new/deeper/new.json"):
        check_file_place(tmp_path / good, "bench")
    assert names(tmp_path) == ["file", "folder"]  # nothing is made for the check


def test_a_folder_that_holds_a_disk_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "data")
    for place in ("out", "out/data", "link"):
        with pytest.raises(ConfigError, match="cannot be replaced as a whole: it is or holds a disk"):
            check_folder_place(tmp_path / place, "fold")


def test_a_folder_that_cannot_be_replaced_as_a_whole_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "current" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "current" / "inner")
    for place in (Path("."), tmp_path / "current", Path("/")):
        with pytest.raises(ConfigError, match=r"fold: `.*` cannot be replaced as a whole: .* Give a folder in it"):
            check_folder_place(place, "fold")
    with pytest.raises(ConfigError, match=r"fold: `.*file` is a file, and the result is a folder"):
        check_folder_place(tmp_path / "file", "fold")
    for good in (Path("new"), Path("../other"), tmp_path / "new" / "deeper"):
        check_folder_place(good, "fold")
    assert names(tmp_path) == ["current", "file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="no permission for"):
        check_file_place(tmp_path / "new" / "result.json", "bench")
