"""The rows: as JSON, written whole after every measurement, and as lines of text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from symphony_hf.errors import ConfigError
from symphony_hf.files import write_json


@dataclass(frozen=True)
class Measurement:
    """One form of one model in one mode, at one length.

    Attributes:
        model: `7.4b` or `4.2b`.
        mode: `lora`, `full` or `inference` (prefill).
        text_tokens: Of a sequence, without its image.
        tokens: Of a sequence, with it.
        micro_batch: Sequences of a step.
        optimizer: None in inference.
        form: `stock`; `symphony`: with graphs; `folded`: without, but in the routers' weights; `noise`: stock again.
        rounds: How many times each form was timed.
        milliseconds: Median over rounds of its step.
        tokens_per_second: By that median.
        peak_gib: The most memory that was held in its steps; None on a CPU.
        estimated_gib: What was expected before.
        teraflops: Of a step, by what the mathematics needs.
        utilization: Of the device's peak; None where that is not known.
        ratio: Median over rounds of its time over stock's in the same round; None of stock itself.
        low: Their 25th percentile.
        high: Their 75th percentile.
    """

    model: str
    mode: str
    text_tokens: int
    tokens: int
    micro_batch: int
    optimizer: str | None
    form: str
    rounds: int
    milliseconds: float
    tokens_per_second: float
    peak_gib: float | None
    estimated_gib: float
    teraflops: float
    utilization: float | None
    ratio: float | None
    low: float | None
    high: float | None

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"{self.model}, {self.mode}, {self.form}: {', '.join(bad)} is no finite number")


class Record:
    """What was measured so far, in a file. What is in the file already, from the same machine, is kept.

    Args:
        path: The JSON file.
        measured_on: The device and the versions; rows of others do not go into the same file.

    Raises:
        ConfigError: If the file is there, and is of another machine, of other versions, or no record.
    """

    def __init__(self, path: Path, measured_on: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"measured_on": measured_on, "models": {}, "rows": [], "not_measured": []}
        if path.exists():
            found = _read(path)
            if found["measured_on"] != measured_on:
                raise ConfigError(
                    f"{path} has rows of {found['measured_on']}, and this is {measured_on}: give another --output"
                )
            self.values |= {name: found[name] for name in ("models", "rows")}
        self.write()

    @property
    def rows(self) -> list[Measurement]:
        return [Measurement(**row) for row in self.values["rows"]]

    def has(self, model: str, mode: str, text_tokens: int) -> bool:
        """Whether a measurement is there."""
        return any((row.model, row.mode, row.text_tokens) == (model, mode, text_tokens) for row in self.rows)

    def add(self, rows: Sequence[Measurement]) -> None:
        """Keep the rows of one measurement."""
        self.values["rows"] += [asdict(row) for row in rows]
        self.write()

    def note_model(self, name: str, parameters: int, active: int) -> None:
        """Keep how large a model is."""
        self.values["models"][name] = {"parameters": parameters, "active_parameters": active}
        self.write()

    def leave_out(self, model: str, mode: str, text_tokens: int, reason: str) -> None:
        """Keep why a measurement is not there."""
        left_out = {"model": model, "mode": mode, "text_tokens": text_tokens, "reason": reason}
        self.values["not_measured"].append(left_out)
        self.write()

    def left_out(self) -> list[str]:
        """A line of text on each measurement that is not there."""
        line = "not measured: {model} {mode}, {text_tokens} tokens of text: {reason}"
        return [line.format(**left_out) for left_out in self.values["not_measured"]]

    def write(self) -> None:
        write_json(self.path, self.values)


def _read(path: Path) -> dict[str, Any]:
    names = {field.name for field in fields(Measurement)}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = {"measured_on", "models", "rows"} <= set(values) and all(set(row) == names for row in values["rows"])
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(f"{path} is there, and is no record of this script's: give another --output")
    return values


_COLUMNS = {  # and their widths; negative ones are set to the left
    "model": -5,
    "mode": -9,
    "optimizer": -10,
    "tokens": 12,
    "form": -8,
    "ms/step": 9,
    "tokens/s": 9,
    "peak GiB": 8,
    "MFU": 6,
    "over stock": 10,
    "quartiles": 16,
    "rounds": 6,
}


def header() -> str:
    """The names of the columns."""
    return _line(list(_COLUMNS))


def line_of(row: Measurement) -> str:
    """One row as text; `-` where there is no number."""
    return _line(
        [
            row.model,
            row.mode,
            row.optimizer or "-",
            f"{row.micro_batch} x {row.tokens}",
            row.form,
            f"{row.milliseconds:.1f}",
            f"{row.tokens_per_second:.0f}",
            _text(row.peak_gib, ".1f"),
            _text(row.utilization, ".1%"),
            _text(row.ratio, ".4f"),
            "-" if row.low is None else f"{row.low:.4f} - {row.high:.4f}",
            str(row.rounds),
        ]
    )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: list[str]) -> str:
    sides = {True: "<", False: ">"}
    widths = zip(cells, _COLUMNS.values(), strict=True)
    return "  ".join(f"{cell:{sides[width < 0]}{abs(width)}}" for cell, width in widths)
