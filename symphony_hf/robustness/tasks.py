"""The tasks by name."""

from typing import Any

from ..data.bars import progress_bars
from .classification import ClassificationTask
from .plan import RobustnessSettings
from .store import Store
from .task import Task
from .text import TextTask
from .visual import VisualTask

TASKS: dict[str, type[Task[Any]]] = {"text": TextTask, "classification": ClassificationTask, "vqa": VisualTask}


def open_task(settings: RobustnessSettings, store: Store) -> Task[Any]:
    """The task that the settings name, with its data read.

    Raises:
        SymphonyError: If a model's config, its tokenizer, or the data is not to be had.
    """
    with progress_bars(True):
        return TASKS[settings.task](settings, store)
