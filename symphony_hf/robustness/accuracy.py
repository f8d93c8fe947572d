"""Accuracy with intervals: of one model clean and attacked, and of one against another."""

from collections.abc import Sequence
from typing import Any

from ..evaluation import METRICS, Choices, Interval, compare_changes, compare_choices, metric_interval, pooled_choices
from .plan import Cell
from .task import Measured, Scale

SEED = 0
"""Of the bootstrap."""


class Accuracy(Scale[Choices]):
    """Levels are shares of right answers, changes are differences of attacked and clean, so are models' comparisons.

    With `also`, rows have the same of other metrics: `also`, by name, with `level` and `difference`.

    Args:
        also: Names of `evaluation.METRICS`.
    """

    level, change, lower_is_better = "accuracy", "difference", False

    def __init__(self, also: Sequence[str] = ()) -> None:
        self.also = tuple(also)

    def clean(self, scores: Choices) -> dict[str, Any]:
        """Accuracy, and other metrics."""
        levels = {name: self.as_entry(metric_interval(METRICS[name], scores, seed=SEED)) for name in self._names()}
        also = {name: {"level": level} for name, level in levels.items() if name in self.also}
        return {"accuracy": levels["accuracy"], "also": also}

    def attacked(self, measured: Measured[Choices], cells: Sequence[Cell]) -> dict[str, Any]:
        """Likewise, with the difference to clean questions."""
        attacked = _together(measured, cells)
        rows = {}
        for name in self._names():
            metric = METRICS[name]
            rows[name] = {
                "level": self.as_entry(metric_interval(metric, attacked, seed=SEED)),
                "difference": self.as_entry(compare_choices(metric, attacked, measured.clean, seed=SEED)),
            }
        return self._row(rows) | {"seeds": self._by_seed(measured, cells)}

    def comparison(self, a: Measured[Choices], b: Measured[Choices]) -> dict[str, Any]:
        """`also`: the differences of other metrics on clean questions."""
        compared = {name: compare_choices(METRICS[name], a.clean, b.clean, seed=SEED) for name in self.also}
        return {"also": {name: self.as_entry(interval) for name, interval in compared.items()}}

    def compare_clean(self, a: Measured[Choices], b: Measured[Choices]) -> Interval:
        """The difference of accuracies."""
        return compare_choices(METRICS["accuracy"], a.clean, b.clean, seed=SEED)

    def compare_attacked(self, a: Measured[Choices], b: Measured[Choices], cells: Sequence[Cell]) -> dict[str, Any]:
        """The difference of accuracies on attacked questions, and that of what the attack takes from them."""
        ours, theirs = _together(a, cells), _together(b, cells)
        rows = {}
        for name in self._names():
            metric = METRICS[name]
            changes = compare_changes(metric, a.clean, ours, b.clean, theirs, seed=SEED)
            rows[name] = {
                "level": self.as_entry(compare_choices(metric, ours, theirs, seed=SEED)),
                "difference": self.as_entry(changes),
            }
        return self._row(rows)

    def _names(self) -> tuple[str, ...]:
        return ("accuracy", *self.also)

    def _row(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        first = rows.pop("accuracy")
        return {"accuracy": first["level"], "difference": first["difference"], "also": rows}

    def _by_seed(self, measured: Measured[Choices], cells: Sequence[Cell]) -> dict[str, float]:
        """Accuracy of each seed, over all severities of the group: how much hangs on the attack's chance."""
        seeds = dict.fromkeys(cell.seed for cell in cells)
        own = {seed: _together(measured, [cell for cell in cells if cell.seed == seed]) for seed in seeds}
        return {str(seed): METRICS["accuracy"].of(choices) for seed, choices in own.items()}


def _together(measured: Measured[Choices], cells: Sequence[Cell]) -> Choices:
    return pooled_choices([measured.attacked[cell] for cell in cells])
