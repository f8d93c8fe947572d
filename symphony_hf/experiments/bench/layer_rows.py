"""Rows of `symphony bench`: ratios of time and of peak memory, and their tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from symphony_hf.tables import Table, TableCell

from .gradient import gradient_table
from .results import number_cell, print_result

AIMS = {
    "training": 1.01,
    "training, added": 1.01,
    "watched": 1.01,
    "inference": 1.005,
    "inference, added": 1.005,
    "folded": 1.0,
    "generate": 1.005,
    "training memory": 1.01,
    "generate memory": 1.01,
}

_ADDED = ("training, added", "watched", "inference, added")
_WHOLE = ("training", "training noise", "inference", "folded", "noise")


@dataclass(frozen=True)
class Measurement:
    """One measured ratio.

    Attributes:
        model: Model whose layer shapes were used.
        mode: `training` (forward and backward), `inference` or `generate` of the symphony form; `training, added` and
            `inference, added`: from the time that the graph adds to bare layers; `watched`: from the time that
            RoutingMonitor adds to their training; `folded`: inference of the folded form; `noise`, `training noise`
            and `generate noise`: stock against stock, of inference unless it says so.
        tokens: Tokens of one forward; for a generation, its sequences.
        rounds: Number of rounds.
        ratio: Median over rounds of its time over stock's in the same round; for added time, 1 and its share of
            `stock_seconds`.
        low: 25th percentile of these ratios.
        high: 75th percentile of these ratios.
        stock_seconds: Median time of the whole layer's stock form.
    """

    model: str
    mode: str
    tokens: int
    rounds: int
    ratio: float
    low: float
    high: float
    stock_seconds: float


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of a step.

    Attributes:
        model: Model whose layer shapes were used.
        step: `training` or `generate`.
        tokens: Tokens of one forward; for a generation, its sequences.
        stock_bytes: Bytes of the stock form: its weights, and the peak of what the step allocates.
        bytes: Bytes of the symphony form.
        ratio: Its bytes over stock's.
    """

    model: str
    step: str
    tokens: int
    stock_bytes: int
    bytes: int
    ratio: float


def bench_tables(result: dict[str, Any]) -> list[Table]:
    """Return the times of a result as tables: a row for each model and length, a column for each mode."""
    machine = f"one decoder layer, {result['dtype']} on {result['device']}; medians and quartiles"
    tables = (
        _table(result, f"What is added, over stock's time: {machine}", "tokens", _ADDED, stock_of=_ADDED[::2]),
        _table(result, f"Time over stock: {machine}", "tokens", _WHOLE),
        _table(result, f"Generation over stock: {machine}", "sequences", ("generate", "generate noise")),
    )
    return [table for table in tables if table.rows]


def _table(
    result: dict[str, Any], title: str, length: str, modes: Sequence[str], stock_of: Sequence[str] = ()
) -> Table:
    aims = result["aims"]
    header = ["model", length, *(f"{mode}, at most {aims[mode]:g}" if mode in aims else mode for mode in modes)]
    rows = {(row["model"], row["tokens"], row["mode"]): row for row in result["rows"] if row["mode"] in modes}
    cells: list[list[TableCell | str]] = [
        [
            model,
            number_cell(tokens, "d"),
            *(_ratio_cell(rows.get((model, tokens, mode))) for mode in modes),
            *(number_cell(1000 * rows[model, tokens, mode]["stock_seconds"], ".0f") for mode in stock_of),
        ]
        for model, tokens in dict.fromkeys((model, tokens) for model, tokens, _ in rows)
    ]
    return Table(title, [*header, *(f"stock {mode.partition(',')[0]}, ms" for mode in stock_of)], cells)


def _ratio_cell(row: dict[str, Any] | None) -> TableCell | str:
    if row is None:
        return ""
    return TableCell(f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}]", row["ratio"])


def memory_table(result: dict[str, Any]) -> Table:
    """Return the peak memory of a result as a table."""
    rows: list[list[TableCell | str]] = [
        [
            row["model"],
            row["step"],
            number_cell(row["tokens"], "d"),
            number_cell(row["ratio"], ".4f"),
            number_cell(row["stock_bytes"] / 1e9, ".3f"),
            number_cell(result["aims"][f"{row['step']} memory"], "g"),
        ]
        for row in result["memory"]
    ]
    return Table("Peak memory over stock", ["model", "step", "tokens", "ratio", "stock, GB", "aim"], rows)


def print_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the measurements, and the path of their file."""
    if "gradients" in result:
        return print_result(result, [gradient_table(result)], console)
    tables = [*bench_tables(result), *([memory_table(result)] if result["memory"] else [])]
    print_result(result, tables, console)
