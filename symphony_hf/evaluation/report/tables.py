"""Cells and formats of the sortable tables of the page."""

import math
from collections.abc import Sequence
from typing import Any

from symphony_hf.evaluation.statistics import Interval
from symphony_hf.tables import Table, TableCell

from .runs import Level

MISSING = "–"
_PERCENT = ("accuracy", "routing stability")
_TONES = {"better": "better", "worse": "worse", "not distinguishable": "level"}


def make_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[TableCell]], num_runs: int) -> Table:
    """Make a table without empty columns, and without the column of runs if there is one run."""
    kept = [
        position
        for position, name in enumerate(header)
        if not (name == "run" and num_runs == 1) and any(row[position].text != MISSING for row in rows)
    ]
    return Table(
        caption, [header[position] for position in kept], [[row[position] for position in kept] for row in rows]
    )


def text(value: Any, *, code: bool = False) -> TableCell:
    """Return a cell with a word, a name, or a setting in full."""
    if value is None or value == "":
        return TableCell(MISSING)
    if isinstance(value, bool):
        return TableCell("yes" if value else "no")
    if isinstance(value, int):
        return number(value)
    if isinstance(value, float):
        return TableCell(repr(value), value)
    if isinstance(value, list | tuple):
        return TableCell(", ".join(map(str, value)), code=code)
    return TableCell(str(value), code=code)


def number(value: float | None, form: str | None = None) -> TableCell:
    """Return a cell with a number: integers with commas, others to four digits unless a format is given."""
    if value is None:
        return TableCell(MISSING)
    if form is None:
        form = "," if isinstance(value, int) else four_digits(value)
    return TableCell(format(value, form), float(value))


def interval(value: Interval | None, metric: str = "") -> TableCell:
    """Return a cell with an estimate and its ends, sorted by the estimate."""
    if value is None:
        return TableCell(MISSING)
    return TableCell(show_interval(value, metric), value.estimate)


def show_interval(value: Interval, metric: str = "") -> str:
    """Format an estimate with its ends, all to the same digit."""
    form = level_format(metric, value.estimate, value.low, value.high)
    return f"{value.estimate:{form}} [{value.low:{form}}, {value.high:{form}}]"


def show(value: float, metric: str = "") -> str:
    """Format a value of a metric."""
    return format(value, level_format(metric, value))


def level(value: Level) -> tuple[TableCell, TableCell, TableCell]:
    """Return cells with a level and the ends of its interval."""
    form = level_format(value.metric, value.value)
    return number(value.value, form), number(value.low, form), number(value.high, form)


def sample(value: Level) -> TableCell:
    """Return a cell with the number of documents, windows or questions that a level is measured on."""
    if value.number is None:
        return TableCell(MISSING)
    return TableCell(f"{value.number:,} {value.unit}", float(value.number))


def is_share(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric in _PERCENT


def level_format(metric: str, *values: float) -> str:
    """Return the format of a metric's values: shares in percent, others to four digits of the largest value."""
    return ".2%" if is_share(metric) else four_digits(*values)


def four_digits(*values: float) -> str:
    """Return the format with which the largest value has four digits, or all of its integer digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0:
        return ".3f"
    return f",.{max(0, 3 - math.floor(math.log10(largest)))}f" if largest >= 1e-4 else ".3e"


def verdict(value: str) -> TableCell:
    """Return a cell with a verdict and its colour."""
    return TableCell(value, tone=_TONES.get(value, ""))
