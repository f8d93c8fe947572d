"""Two runs do not write to one output folder at the same time."""

import errno
import os
from types import SimpleNamespace

import pytest
from small_runs import RECIPE, quickstart_settings, recipe_overrides

from symphony_hf.errors import ConfigError
from symphony_hf.files import UNFINISHED
from symphony_hf.recipe import load_recipe
from symphony_hf.training.output_lock import only_run_in
from symphony_hf.training.quickstart import run_quickstart
from symphony_hf.training.runner import run_recipe

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks")
REFUSED = r"another run is writing to `.*`: wait until it ends, or give this one another output folder"


def test_a_second_run_is_refused_before_it_clears_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(RECIPE, {**recipe_overrides(tmp_path), "symphony.strength": 0})
    written = tmp_path / "run" / UNFINISHED / "checkpoint-4"  # by the first run, at this moment
    written.mkdir(parents=True)
    with only_run_in(tmp_path / "run", "train"), pytest.raises(ConfigError, match=f"train: {REFUSED}"):
        run_recipe(recipe)
    assert written.exists()


def test_a_second_quickstart_is_refused(tmp_path):
    settings = quickstart_settings(tmp_path)
    with only_run_in(tmp_path / "out", "quickstart"), pytest.raises(ConfigError, match=f"quickstart: {REFUSED}"):
        run_quickstart(settings)


def test_the_folder_is_free_after_a_run_that_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), only_run_in(tmp_path / "run", "train"):
            raise KeyError
        assert not (tmp_path / "run").exists()  # nothing was written there
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with only_run_in(tmp_path / "run", "train"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_are_refused_together(rank, tmp_path, monkeypatch):
    """The others would wait for the first one for ever."""
    sent = []

    def gather(problems):
        sent.extend(problems)
        return [problems[0] if rank == 0 else "train: the first one's message", None]

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    arguments = SimpleNamespace(process_index=rank, world_size=2)
    with only_run_in(tmp_path / "run", "train"):
        with pytest.raises(ConfigError, match=f"train: {REFUSED if rank == 0 else 'the first'}"):
            with only_run_in(tmp_path / "run", "train", arguments):
                raise AssertionError("the second one began")
    assert [problem is None for problem in sent] == [rank == 1]


@pytest.mark.parametrize(("code", "text"), [(errno.ENOLCK, None), (errno.EROFS, "Read-only file system")])
def test_a_disk_without_locks_is_used_and_one_that_cannot_be_written_is_refused(code, text, tmp_path, monkeypatch):
    import fcntl

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    if text is None:
        with only_run_in(tmp_path, "train"), only_run_in(tmp_path, "train"):
            pass
    else:
        with pytest.raises(ConfigError, match=rf"train: `.*` cannot be written \({text}\)"):
            with only_run_in(tmp_path, "train"):
                raise AssertionError("it began")
