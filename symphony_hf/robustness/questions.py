"""What the tasks with right answers share: which rows are asked, and what is kept of each attacked form of them."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ..data.rows import Rows, thinned
from ..errors import DataError
from ..evaluation import MIN_DOCUMENTS, Choices
from .plan import Cell, RobustnessSettings
from .store import Store
from .task import Measured, Task

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 1
"""Of an entry of the store. Raise it when the same model and questions should give other answers."""


class QuestionTask(Task[Choices]):
    """Questions with right answers.

    Attributes:
        cells: The attacked forms.
        store: What was measured before.
        source: What was read.
        answers: The numbers of the right answers. Shape: (questions,).
    """

    cells: list[Cell]
    store: Store
    source: str
    answers: np.ndarray

    @abstractmethod
    def identity(self, role: str, cell: Cell | None) -> dict[str, Any]:
        """What decides the answers beside the model's weights, in what JSON can write. The cell is None for clean."""

    @abstractmethod
    def choose(self, role: str, cell: Cell | None) -> dict[str, np.ndarray]:
        """Ask all questions. `chosen`: numbers of the answers, shape (questions,), integer; more is kept with it."""

    def measure(self, role: str) -> Measured[Choices]:
        """One model on all forms, from the store where it was measured before."""
        clean = self._choices(role, None)
        # disable=None: no bar where the output is not a terminal, such as a log file.
        bar = tqdm(self.cells, desc=f"Measuring {role}", unit=" attacked forms", delay=2, disable=None)
        attacked = {cell: self._choices(role, cell) for cell in bar}
        self.subjects[role].release()
        return Measured(clean, attacked)

    def told(self, measured: Mapping[str, Measured[Choices]]) -> dict[str, Any]:
        """What was asked."""
        return {"documents": {"source": self.source, "number": len(self.answers), "unit": "questions"}}

    def _choices(self, role: str, cell: Cell | None) -> Choices:
        subject = self.subjects[role]
        identity = {
            "format": _FORMAT,
            "model": subject.fingerprint,
            "dtype": subject.dtype,
            **self.identity(role, cell),
        }
        label = "clean" if cell is None else str(cell)
        stored = self.store.load(label, identity)
        if stored is None:
            stored = self.choose(role, cell)
            self.store.save(label, identity, stored)
        return Choices(stored["chosen"][np.newaxis], self.answers)


def select_rows(rows: Rows, settings: RobustnessSettings) -> tuple[str, "Dataset", list[str]]:
    """The rows that are asked.

    Args:
        rows: By split.
        settings: Which split, and how many.

    Returns:
        What they are, the rows, and a name for each: its split and place there.

    Raises:
        DataError: If there is no such split, or it has too few rows for an interval.
    """
    import datasets

    is_file = settings.data is not None and Path(settings.data).expanduser().is_file()
    usual = "all" if is_file else next(split for split in ("test", "validation", "train") if split in rows.splits)
    split = settings.split or usual
    if split != "all" and split not in rows.splits:
        raise DataError(f"{rows.source}: no {split} split; it has {', '.join(rows.splits)}: name one with --split")
    splits = list(rows.splits) if split == "all" else [split]
    places = [(name, place) for name in splits for place in range(len(rows.splits[name]))]
    kept = thinned(places, settings.documents)
    where = rows.source if split == "all" else f"{rows.source}, {split} split"
    check_number(where, len(kept))
    tables = [rows.splits[name].select([place for own, place in kept if own == name]) for name in splits]
    return where, datasets.concatenate_datasets(tables), [f"{name}[{place}]" for name, place in kept]


def check_number(where: str, number: int) -> None:
    """Refuse too few questions.

    Raises:
        DataError: If no interval can be given.
    """
    if number < MIN_DOCUMENTS:
        raise DataError(
            f"{where}: {number} questions to ask; intervals need {MIN_DOCUMENTS}: give more, another --split, or raise "
            "--documents"
        )
