"""The evaluation that `symphony eval` runs."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from symphony_hf.compat import versions
from symphony_hf.data.datasets import progress_bars
from symphony_hf.files import write_json
from symphony_hf.results import check_results, remove_results

from .questions import ClassificationTask
from .settings import RobustnessSettings
from .summary import summarize
from .task import Store, Task
from .text import TextTask
from .vqa import VisualTask

TASKS: dict[str, type[Task[Any]]] = {"text": TextTask, "classification": ClassificationTask, "vqa": VisualTask}

RESULT, PICTURE = "result.json", "robustness.png"
_KEYS = ("models", "versions")
"""Keys of its result. That of `symphony routing`, which has the same name, lacks the first."""


def open_task(settings: RobustnessSettings, store: Store) -> Task[Any]:
    """Return the task of the settings, with its data read.

    Raises:
        SymphonyError: If a model's config, its tokenizer, or the data could not be loaded.
    """
    # The default text is that of the running Python, and importing `datasets` for its bars takes seconds.
    is_own = settings.task == "text" and settings.data is None
    quiet = contextlib.nullcontext() if is_own else progress_bars(True)
    with quiet:
        return TASKS[settings.task](settings, store)


def evaluate_robustness(settings: RobustnessSettings) -> dict[str, Any]:
    """Measure one or two models on clean and attacked inputs, with confidence intervals and verdicts.

    Finished measurements are kept in `output/cells`, so an interrupted call resumes. An earlier evaluation's result and
    picture are removed before the first measurement.

    Returns:
        The contents of `output/result.json`, whose structure is the same for all tasks. `measure` names the entries of
        a row that are the level and the change under attack, and which is better. `models` by role, and `comparisons`
        of two models, see `summarize`. `documents` describes the data. Also `settings`, `fingerprints`, `versions` and
        `notes`.

    Raises:
        SymphonyError: If a model or the data could not be loaded, a number is not finite, or a file in the folder would
            be replaced that no earlier evaluation wrote.
    """
    started = time.perf_counter()
    output = Path(settings.output)
    check_results(output / RESULT, [PICTURE], "eval", _KEYS)
    task = open_task(settings, Store(output / "cells"))
    remove_results(output / RESULT, [PICTURE], _KEYS)
    measured = {role: task.measure(role) for role in task.models_under_test}
    described = task.describe(measured)  # its warnings help to understand an error of the summary
    result = {
        "task": settings.task,
        **summarize(measured, task.report),
        "settings": dataclasses.asdict(settings),
        **described,
        "fingerprints": {role: checkpoint.fingerprint for role, checkpoint in task.models_under_test.items()},
        "versions": versions(),
        "notes": task.notes,
        "seconds": time.perf_counter() - started,
    }
    write_json(output / RESULT, result)
    return result
