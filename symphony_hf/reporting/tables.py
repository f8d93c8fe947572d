"""Tables that can be sorted: what each cell says, and what it is sorted by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import Interval
from .runs import Level

MISSING = "–"
_PERCENT = ("accuracy", "routing choices kept")
_TONES = {"better": "better", "worse": "worse", "not distinguishable": "level"}


@dataclass(frozen=True)
class Cell:
    """What a reader sees.

    Attributes:
        text: As it is shown.
        value: What it is sorted by, where that is a number.
        tone: Of a verdict: `better`, `worse` or `level`.
        code: Whether it is a name in a program.
    """

    text: str
    value: float | None = None
    tone: str = ""
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under sortable headers.

    Attributes:
        caption: What it shows.
        header: Of the columns. The first names the rows.
        numeric: Which columns are set flush right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """By column: whether it has numbers."""
        return [any(row[place].value is not None for row in self.rows) for place in range(len(self.header))]


def text(value: Any, *, code: bool = False) -> Cell:
    """A word, a name, a setting."""
    if value is None or value == "":
        return Cell(MISSING)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return Cell(", ".join(map(str, value)), code=code)
    return Cell(str(value), code=code)


def number(value: float | None, form: str | None = None) -> Cell:
    """A number; whole ones with commas, others to four digits unless a format says otherwise."""
    if value is None:
        return Cell(MISSING)
    if form is None:
        form = "," if isinstance(value, int) else ".4g"
    return Cell(format(value, form), float(value))


def interval(value: Interval | None, form: str = ".4g") -> Cell:
    """An estimate with its ends, sorted by the estimate."""
    if value is None:
        return Cell(MISSING)
    ends = f"{value.low:{form}}, {value.high:{form}}"
    return Cell(f"{value.estimate:{form}} [{ends}]", value.estimate)


def level(value: Level) -> tuple[Cell, Cell, Cell]:
    """A level and the ends of its interval."""
    form = level_format(value.metric)
    return number(value.value, form), number(value.low, form), number(value.high, form)


def level_format(metric: str) -> str:
    """How a metric's values are written."""
    return ".2%" if metric in _PERCENT else ".4g"


def verdict(value: str) -> Cell:
    """A verdict, as a word and a colour."""
    return Cell(value, tone=_TONES.get(value, ""))
