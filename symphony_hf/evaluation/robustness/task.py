"""Base classes of the evaluation tasks, their metric reports, and the store of finished measurements."""

import dataclasses
import functools
import hashlib
import json
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np

from symphony_hf.compat import versions
from symphony_hf.errors import SymphonyWarning
from symphony_hf.evaluation.checkpoint import ModelUnderTest
from symphony_hf.evaluation.clean_attacked import Measured, Scores, measure_forms
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.statistics import Interval
from symphony_hf.files import replacing

from .settings import RobustnessSettings

_FORMAT = 1
"""Format of a stored measurement. Raise it when the same model and inputs should give other numbers."""

_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile)
"""Errors of numpy for a file that is truncated or not its own."""


class Store:
    """A folder of measurements, one for each combination of model, inputs and settings. Created on the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, label: str, identity: Mapping[str, Any]) -> bool:
        """Whether there is a file of an earlier measurement, which may be damaged."""
        return self._path(label, identity).is_file()

    def load(self, label: str, identity: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Return an earlier measurement, or None. A damaged file is measured again, with a SymphonyWarning."""
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
        """Write a measurement atomically."""
        # An open file, because numpy adds a suffix to names.
        with replacing(self._path(label, identity)) as written, written.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def get(
        self, label: str, identity: Mapping[str, Any], measure: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return an earlier measurement, or measure and keep it."""
        stored = self.load(label, identity)
        if stored is None:
            stored = measure()
            self.save(label, identity, stored)
        return stored

    def _path(self, label: str, identity: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{label}-{digest[:20]}.npz"


class MetricReport(ABC, Generic[Scores]):
    """Converts scores to intervals for result.json.

    Attributes:
        level: Name of the metric on one form, and of the entry with its interval.
        change: Name of the change from clean to attacked, and of the entry with its interval.
        lower_is_better: Whether a lower level is better.
        also: Names of further levels, which are entries of `also`.
    """

    level: str
    change: str
    lower_is_better: bool
    also: Sequence[str] = ()

    @abstractmethod
    def clean(self, scores: Scores) -> dict[str, Any]:
        """Return the level on clean examples."""

    @abstractmethod
    def attacked(self, measured: Measured[Scores], cases: Sequence[AttackCase]) -> dict[str, Any]:
        """Return level and change of some attacked forms together, and `seeds`: the level of each seed."""

    def comparison(self, a: Measured[Scores], b: Measured[Scores]) -> dict[str, Any]:
        """Return entries that apply to the comparison as a whole."""
        return {}

    @abstractmethod
    def compare_clean(self, a: Measured[Scores], b: Measured[Scores]) -> Interval:
        """Compare the levels of two models on clean examples."""

    @abstractmethod
    def compare_attacked(self, a: Measured[Scores], b: Measured[Scores], cases: Sequence[AttackCase]) -> dict[str, Any]:
        """Compare level and change of two models on some attacked forms together."""

    def as_entry(self, interval: Interval) -> dict[str, Any]:
        """Return an interval as an entry of result.json, with a verdict if it is a comparison."""
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
    """Clean and attacked inputs, and how models are scored on them.

    The constructor reads configs, tokenizers and data, so that their errors come before any weights are loaded.

    Attributes:
        auto_class: Auto class of transformers that loads the models.
        models_under_test: The models, by role.
        sources: Source and revision of each model's tokenizer or processor, by role.
        cases: The attacked forms.
        report: Metric report that turns scores into intervals.
        notes: Notes on the data, for the reader.
    """

    auto_class: ClassVar[Any]
    report: MetricReport[Scores]

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        self.store, self.cases, self.batch_size = store, settings.cases(), settings.batch_size
        self.notes: list[str] = []
        self.models_under_test = {
            role: ModelUnderTest(*source, settings.dtype, self.auto_class) for role, source in settings.models().items()
        }
        self.sources = {
            role: (model.source, model.revision) if settings.tokenizer is None else (settings.tokenizer, None)
            for role, model in self.models_under_test.items()
        }

    def measure(self, role: str) -> Measured[Scores]:
        """Score a model on all forms. Finished forms are kept if the process ends before the others.

        Raises:
            SymphonyError: If a form could not be scored.
        """
        measured = measure_forms(functools.partial(self.score, role), self.cases, progress=f"Measuring {role}")
        self.models_under_test[role].release()
        return measured

    @abstractmethod
    def score(self, role: str, case: AttackCase | None) -> Scores:
        """Score a model on one form of the inputs, the clean one if the case is None."""

    @abstractmethod
    def describe(self, measured: Mapping[str, Measured[Scores]]) -> dict[str, Any]:
        """Return entries of the result: `documents`, with `source`, `number` and `unit`, and others of the task."""

    def stored(
        self,
        role: str,
        case: AttackCase | None,
        inputs: Mapping[str, Any],
        measure: Callable[[], dict[str, np.ndarray]],
        *,
        label: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Return an earlier measurement of a model on the same inputs, or measure and keep it.

        `inputs` is everything besides the weights that determines the numbers, as JSON values. `label` names what else
        than the score of the case is measured.
        """
        return self.store.get(label or _label(case), self._identity(role, inputs), measure)

    def is_stored(self, role: str, case: AttackCase | None, inputs: Mapping[str, Any]) -> bool:
        """Whether there is an earlier measurement of a model on the same inputs."""
        return self.store.has(_label(case), self._identity(role, inputs))

    def _identity(self, role: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        model = self.models_under_test[role]
        return {
            "format": _FORMAT,
            "model": model.fingerprint,
            "dtype": model.dtype,
            "versions": versions(),
            **inputs,
        }


def _label(case: AttackCase | None) -> str:
    return "clean" if case is None else str(case)
