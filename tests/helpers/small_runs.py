"""Runs of the project's own commands, scaled down to seconds, on synthetic text."""

import pickle
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from symphony_hf.recipe import load_recipe
from symphony_hf.training.quickstart import QuickstartSettings, run_quickstart
from symphony_hf.training.runner import run_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "config.yaml"


def quickstart_settings(folder):
    """A quickstart of eight steps, which writes to `out` in the folder."""
    text = folder / "text"
    for split, count in (("train", 30), ("validation", 4), ("test", 14)):
        (text / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            offset = number * 31 + len(split)
            lines = [f"line{(offset + n * 7) % 97} of text{n % 23} says value{offset % 19}" for n in range(16)]
            (text / split / f"{number}.txt").write_text("\n".join(lines))
    return QuickstartSettings(
        output=str(folder / "out"),
        data=str(text),
        pretrain_steps=4,
        finetune_steps=4,
        batch_size=4,
        block_size=32,
        vocab_size=300,
        documents=12,
    )


def recipe_overrides(folder):
    """For the recipe of the quickstart: three steps, which write to `run` in the folder."""
    text = folder / "text"
    text.mkdir()
    words = [f"word{n} speaks of thing{n * 7 % 13} and place{n * 5 % 11}" for n in range(400)]
    for number in range(40):
        (text / f"{number}.txt").write_text("\n".join(words[number * 7 : number * 7 + 60]))
    return {
        "data.path": str(text),
        "data.vocab_size": 300,
        "data.block_size": 16,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "output.directory": str(folder / "run"),
    }


def smoke_overrides(folder):
    """For a smoke recipe, which writes to `run` in the folder."""
    return {"output.directory": str(folder / "run"), "disable_tqdm": True, "dataloader_pin_memory": False}


class SharedRuns:
    """Runs that several test files read. Each is made once, by the first process that needs it; change a copy.

    Args:
        root: Folder that the processes of a test session share.
    """

    def __init__(self, root):
        self.root = root

    def make(self, name, run):
        """Return the folder that `run(folder)` filled, and what it returned."""
        folder, returned = self.root / name, self.root / f"{name}.pickle"
        self.root.mkdir(exist_ok=True)
        with FileLock(self.root / f"{name}.lock"):
            if not returned.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failure left
                folder.mkdir()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("SYMPHONY_HF_CACHE", str(self.root / "cache"))
                    returned.write_bytes(pickle.dumps(run(folder)))
        return folder, pickle.loads(returned.read_bytes())

    def quickstart(self):
        """Return the folder of a quickstart that wrote to `out`, and its report."""
        return self.make("a quick start", lambda folder: run_quickstart(quickstart_settings(folder)))

    def smoke(self, path):
        """Return the folder of a smoke recipe that wrote to `run`, and its results."""
        return self.make(
            f"{path.parent.name}-{path.stem}",
            lambda folder: run_recipe(load_recipe(path, smoke_overrides(folder)), "a command"),
        )
