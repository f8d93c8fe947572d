"""Base classes of the evaluation tasks, their metric reports, and the store of finished measurements."""

import dataclasses
import hashlib
import json
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from symphony_hf.errors import SymphonyWarning
from symphony_hf.evaluation.checkpoint import ModelUnderTest
from symphony_hf.evaluation.statistics import Interval
from symphony_hf.files import replacing

from .settings import AttackCase, RobustnessSettings

_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile)
"""What numpy raises for a file that is none of its own, or ends too early."""


class Store:
    """A folder of measurements, each under what decides its numbers: another model, text or setting is another entry.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, label: str, identity: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Return an earlier measurement, or None.

        Warns:
            SymphonyWarning: If the file is damaged, which is then measured again.
        """
        path = self._path(label, identity)
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except _BROKEN as error:
            warnings.warn(f"{path}: damaged, so it is measured again ({error})", SymphonyWarning, stacklevel=2)
            return None

    def save(self, label: str, identity: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a measurement: the whole of it is there, or nothing."""
        # An open file: given a name, numpy would add its suffix.
        with replacing(self._path(label, identity)) as written, written.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def _path(self, label: str, identity: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{label}-{digest[:20]}.npz"


Scores = TypeVar("Scores")
"""What a model made of each example in one form of them."""


@dataclass(frozen=True, eq=False)
class Measured(Generic[Scores]):
    """One model on all forms of the examples.

    Attributes:
        clean: Scores on the clean examples.
        attacked: Scores on each attacked form.
    """

    clean: Scores
    attacked: dict[AttackCase, Scores]


class MetricReport(ABC, Generic[Scores]):
    """Conversion of scores to intervals for result.json.

    Attributes:
        level: Name of the metric on one form; the entry of that name is its interval.
        change: Name of the change from clean to attacked; the entry of that name is its interval.
        lower_is_better: Whether a lower level is better.
        also: Further levels, entries of `also`.
    """

    level: str
    change: str
    lower_is_better: bool
    also: Sequence[str] = ()

    @abstractmethod
    def clean(self, scores: Scores) -> dict[str, Any]:
        """The level on clean examples."""

    @abstractmethod
    def attacked(self, measured: Measured[Scores], cases: Sequence[AttackCase]) -> dict[str, Any]:
        """Level and change of some attacked forms together, and `seeds`: the level of each seed."""

    def comparison(self, a: Measured[Scores], b: Measured[Scores]) -> dict[str, Any]:
        """Return entries that apply to the comparison as a whole."""
        return {}

    @abstractmethod
    def compare_clean(self, a: Measured[Scores], b: Measured[Scores]) -> Interval:
        """One model's level against the other's on clean examples."""

    @abstractmethod
    def compare_attacked(self, a: Measured[Scores], b: Measured[Scores], cases: Sequence[AttackCase]) -> dict[str, Any]:
        """One model's level and change against the other's, on some attacked forms together."""

    def as_entry(self, interval: Interval) -> dict[str, Any]:
        """An interval as result.json has it: with a verdict if it is of a comparison."""
        values = dataclasses.asdict(interval)
        return values if interval.null is None else values | {"verdict": interval.verdict(self.lower_is_better)}

    def describe(self) -> dict[str, Any]:
        """Describe the metric for readers of the result."""
        return {
            "level": self.level,
            "change": self.change,
            "lower_is_better": self.lower_is_better,
            "also": list(self.also),
        }


class Task(ABC, Generic[Scores]):
    """Examples, clean and attacked, and how models are measured on them.

    Made, it has read all that can be wrong: configs, tokenizers and data. Only then are weights read.

    Args:
        settings: Which models, data and attacks.
        store: Earlier measurements.

    Attributes:
        models_under_test: The models, by role.
        report: Metric report that turns scores into intervals.
        notes: Notes on the data, for the reader.
    """

    models_under_test: dict[str, ModelUnderTest]
    report: MetricReport[Scores]
    notes: list[str]

    @abstractmethod
    def __init__(self, settings: RobustnessSettings, store: Store) -> None: ...

    @abstractmethod
    def measure(self, role: str) -> Measured[Scores]:
        """One model on all forms; what is finished is kept if the process ends before the rest.

        Raises:
            SymphonyError: If a number could not be measured.
        """

    @abstractmethod
    def describe(self, measured: Mapping[str, Measured[Scores]]) -> dict[str, Any]:
        """Entries of the result: `documents`, with their `source`, `number` and `unit`; others as the task has them."""


def open_models(settings: RobustnessSettings, auto_class: Any) -> dict[str, ModelUnderTest]:
    """The models by role; no weights are read yet."""
    return {role: ModelUnderTest(*named, settings.dtype, auto_class) for role, named in settings.models().items()}


def source_of_text(settings: RobustnessSettings, checkpoint: ModelUnderTest) -> tuple[str, str | None]:
    """Where a model's tokenizer or processor is: source and revision."""
    if settings.tokenizer is not None:
        return settings.tokenizer, None
    return checkpoint.source, checkpoint.revision
