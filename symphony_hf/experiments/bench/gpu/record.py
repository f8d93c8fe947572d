"""Measurements of the GPU benchmark, as a JSON file that is written after each case, and as lines of text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from symphony_hf.errors import ConfigError
from symphony_hf.files import write_json


@dataclass(frozen=True)
class FormMeasurement:
    """One form of one model in one mode, at one length.

    Attributes:
        model: `7.4b` or `4.2b`.
        mode: `lora`, `full` or `inference` (prefill).
        text_tokens: Number of tokens in a sequence, without its image.
        tokens: Number of tokens in a sequence, with its image.
        micro_batch: Number of sequences in a step.
        optimizer: Name of the optimizer; None in inference.
        form: `stock`, `symphony` (with graphs), `folded` (graphs folded into the routers), or `noise` (stock again).
        rounds: Number of rounds.
        milliseconds: Median time of a step over rounds.
        tokens_per_second: Throughput at the median time.
        peak_gib: Peak memory of the steps; None on a CPU.
        estimated_gib: Memory estimate from before the run.
        teraflops: Model FLOPs of a step, in units of 1e12.
        utilization: Share of the device's peak; None if the peak is unknown.
        ratio: Median over rounds of the time over stock's in the same round; None for stock.
        low: 25th percentile of these ratios.
        high: 75th percentile of these ratios.
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
            raise ValueError(f"{self.model}, {self.mode}, {self.form}: {', '.join(bad)} is not finite")


class Record:
    """Measurements in a JSON file. Those that the file already has are kept.

    `measured_on` is the device, versions and settings, which must be the same for all rows of a file: one from
    elsewhere raises ConfigError.
    """

    def __init__(self, path: Path, measured_on: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"measured_on": measured_on, "models": {}, "rows": [], "not_measured": []}
        if path.exists():
            found = _read(path)
            if found["measured_on"] != measured_on:
                raise ConfigError(
                    f"{path} has measurements of {found['measured_on']}, not {measured_on}: give another --output"
                )
            self.values |= {name: found[name] for name in ("models", "rows")}
        self.write()

    @property
    def rows(self) -> list[FormMeasurement]:
        return [FormMeasurement(**row) for row in self.values["rows"]]

    def has(self, model: str, mode: str, text_tokens: int) -> bool:
        """Whether a case has been measured."""
        return any((row.model, row.mode, row.text_tokens) == (model, mode, text_tokens) for row in self.rows)

    def add(self, rows: Sequence[FormMeasurement]) -> None:
        """Add the measurements of a case, and write the file."""
        self.values["rows"] += [asdict(row) for row in rows]
        self.write()

    def note_model(self, name: str, parameters: int, active: int) -> None:
        """Record the size of a model."""
        self.values["models"][name] = {"parameters": parameters, "active_parameters": active}
        self.write()

    def leave_out(self, model: str, mode: str, text_tokens: int, reason: str) -> None:
        """Record why a case was not measured."""
        left_out = {"model": model, "mode": mode, "text_tokens": text_tokens, "reason": reason}
        self.values["not_measured"].append(left_out)
        self.write()

    def left_out(self) -> list[str]:
        """Return one line of text for each case that was not measured."""
        line = "not measured: {model} {mode}, {text_tokens} tokens of text: {reason}"
        return [line.format(**left_out) for left_out in self.values["not_measured"]]

    def write(self) -> None:
        write_json(self.path, self.values)


def _read(path: Path) -> dict[str, Any]:
    names = {field.name for field in fields(FormMeasurement)}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = {"measured_on", "models", "rows"} <= set(values) and all(set(row) == names for row in values["rows"])
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(f"{path} is not a result of this benchmark: give another --output")
    return values


_COLUMNS = {  # widths; negative for left-aligned columns
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
    """Return the line of column names."""
    return _line(list(_COLUMNS))


def line_of(row: FormMeasurement) -> str:
    """Return a measurement as a line of text, with `-` for missing numbers."""
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
