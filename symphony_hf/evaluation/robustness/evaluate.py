"""evaluate_robustness: everything that `symphony eval` does."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from symphony_hf.compat import versions
from symphony_hf.data.datasets import progress_bars
from symphony_hf.files import check_file_place, write_json

from .questions import ClassificationTask
from .settings import RobustnessSettings
from .summary import summarize
from .task import Store, Task
from .text import TextTask
from .vqa import VisualTask

TASKS: dict[str, type[Task[Any]]] = {"text": TextTask, "classification": ClassificationTask, "vqa": VisualTask}


def open_task(settings: RobustnessSettings, store: Store) -> Task[Any]:
    """The task that the settings name, with its data read.

    Raises:
        SymphonyError: If a model's config, its tokenizer, or the data could not be loaded.
    """
    with progress_bars(True):
        return TASKS[settings.task](settings, store)


def evaluate_robustness(settings: RobustnessSettings) -> dict[str, Any]:
    """Measure one or two models on examples and on their attacked forms, and say what is more than chance.

    The same call again takes what was measured before from `output/cells`, and goes on from there.

    Args:
        settings: Which models, which task and data, which attacks.

    Returns:
        As in `output/result.json`, which has one shape for all tasks. `measure` says which entry of a row is the level
        and which the change under attack, and what is better. `models` by role, and `comparisons` where there are
        two, see `summarize`. `documents`: what was evaluated on. `settings`, `fingerprints`, `versions`, `notes`.

    Raises:
        SymphonyError: If a model or the data could not be loaded, or a number is not finite.
    """
    started = time.perf_counter()
    output = Path(settings.output)
    check_file_place(output / "result.json", "eval")
    task = open_task(settings, Store(output / "cells"))
    measured = {role: task.measure(role) for role in task.models_under_test}
    result = {
        "task": settings.task,
        **summarize(measured, task.report),
        "settings": dataclasses.asdict(settings),
        **task.describe(measured),
        "fingerprints": {role: checkpoint.fingerprint for role, checkpoint in task.models_under_test.items()},
        "versions": versions(),
        "notes": task.notes,
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "result.json", result)
    return result
