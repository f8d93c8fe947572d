"""What a study found: a table with intervals over seeds, each point beside its system without a graph; and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ..diagnostics.plots import plot_curves, plot_graphs, plot_points
from ..evaluation import SeedInterval, paired_ratio, t_interval
from ..unfinished import write_json, write_text
from .plan import Cell, Results, cells_of
from .point import Point
from .study import Study

MEASURES = ("validation", "clean", "attacked", "ratio", "untouched_clean", "untouched_attacked", "routing_kept")
KEPT = (
    *MEASURES,
    *("train_seconds", "train_cpu_seconds", "tokens_per_cpu_second", "measure_seconds", "tokens", "parameters"),
)
"""Of a cell, in the report."""

HEADER = (
    *("point", "seeds", "clean", "attacked", "attacked / clean", "routing kept"),
    *("clean against no graph", "attacked against no graph", "routing kept against no graph"),
)


def write_ablation(study: Study, results: Results, failed: Mapping[Cell, str]) -> dict[str, Any]:
    """Write `report.json`, `report.md` and the pictures into the results' folder.

    Returns:
        The values of `report.json`.
    """
    cells = cells_of(study)
    done = {cell: values for cell in cells if (values := results.load(cell)) is not None}
    by_point = {
        point: {cell.seed: values for cell, values in done.items() if cell.point == point} for point in study.points()
    }
    report: dict[str, Any] = {
        "rows": [_row(study, point, runs, by_point.get(point.plain, {})) for point, runs in by_point.items() if runs],
        "cells": [
            {"label": cell.point.label(study.base), "seed": cell.seed, **{name: values[name] for name in KEPT}}
            for cell, values in done.items()
        ],
        "missing": [f"{cell.point.label(study.base)}, seed {cell.seed}" for cell in cells if cell not in done],
        "left_out": study.left_out(),
        "failed": {f"{cell.point.label(study.base)}, seed {cell.seed}": words for cell, words in failed.items()},
        "settings": _settings(study, done.values()),
        "machines": list({str(values["machine"]): values["machine"] for values in done.values()}.values()),
        "command": study.command,
        "output": str(results.folder),
    }
    write_json(results.folder / "report.json", report)
    _write_pictures(study, by_point, report["rows"], results.folder)
    write_text(results.folder / "report.md", markdown(report))
    return report


def _settings(study: Study, runs: Any) -> dict[str, Any]:
    recipe = study.recipe
    assert recipe.model.config is not None
    first: Mapping[str, Any] = next(iter(runs), {})
    return {
        "model": recipe.model.config,
        "hidden_size": AutoConfig.for_model(**recipe.model.config).hidden_size,
        "base": dataclasses.asdict(study.base.canonical()),
        "systems": list(study.systems),
        "axes": study.axes,
        "seeds": list(study.seeds),
        "tokens": study.tokens,
        "steps": study.steps,
        "rows": study.rows,
        "block_size": recipe.data.block_size,
        "vocab_size": recipe.data.vocab_size,
        "learning_rate": study.learning_rate,
        "warmup_steps": study.warmup_steps,
        "attack": {"rate": recipe.eval.attack_rate, "minimum": recipe.eval.attack_minimum, "seed": recipe.eval.seed},
        **{name: first.get(name) for name in ("test_tokens", "attacked_tokens")},
    }


def _row(
    study: Study, point: Point, runs: Mapping[int, Mapping[str, Any]], plain: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """A point's means, and its ratios to the plain system's runs of the same seeds."""
    row: dict[str, Any] = {"label": point.label(study.base), "point": dataclasses.asdict(point), "seeds": sorted(runs)}
    for name in MEASURES:
        row[name] = dataclasses.asdict(t_interval([runs[seed][name] for seed in sorted(runs)]))
    shared = sorted(runs.keys() & plain.keys())
    if point.is_plain or not shared:
        return row
    against: dict[str, SeedInterval] = {}
    for name in MEASURES[:-1]:
        against[name] = paired_ratio([runs[seed][name] for seed in shared], [plain[seed][name] for seed in shared])
    against["routing_kept"] = t_interval([runs[seed]["routing_kept"] - plain[seed]["routing_kept"] for seed in shared])
    row["against_plain"] = {
        name: {**dataclasses.asdict(interval), "verdict": _verdict(name, interval)}
        for name, interval in against.items()
    }
    return row


def _verdict(name: str, interval: SeedInterval) -> str:
    """Of one comparison by itself; of twenty at 95%, one is expected to differ by chance."""
    if interval.low is None:
        return "one seed"
    null = 0.0 if name == "routing_kept" else 1.0
    if not interval.excludes(null):
        return "not distinguishable"
    return "better" if (interval.estimate > null) == (name == "routing_kept") else "worse"


def table_of(report: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text, header first."""
    table = [list(HEADER)]
    for row in report["rows"]:
        cells = [row["label"], str(len(row["seeds"]))]
        cells += [_interval(row[name], digits) for name, digits in (("clean", 2), ("attacked", 2), ("ratio", 4))]
        cells.append(_interval(row["routing_kept"], 2, percent=True))
        against = row.get("against_plain")
        for name in ("clean", "attacked", "routing_kept"):
            is_share = name == "routing_kept"
            cells.append(
                f"{_interval(against[name], 2 if is_share else 4, percent=is_share, signed=is_share)}, "
                f"{against[name]['verdict']}"
                if against
                else ""
            )
        table.append(cells)
    return table


def _interval(values: Mapping[str, Any], digits: int, percent: bool = False, signed: bool = False) -> str:
    """With `signed` a difference: of percentages it is in points."""
    scale, sign, unit = (100 if percent else 1), "+" if signed else "", "%" if percent and not signed else ""
    text = f"{scale * values['estimate']:{sign}.{digits}f}{unit}"
    if values["low"] is not None:
        text += f" [{scale * values['low']:.{digits}f}, {scale * values['high']:.{digits}f}]"
    return f"{text} points" if percent and signed else text


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    settings = report["settings"]
    lines = [
        "# Ablation",
        "",
        f"{settings['tokens']:,} tokens a cell, seeds {', '.join(map(str, settings['seeds']))}. Perplexities of the "
        "test text, and 95% t-intervals over seeds in brackets; ratios to the same system without a graph are paired "
        "by seed. Below 1 is better. Each verdict is of its interval alone: of twenty, one is expected to be chance.",
        "",
        *as_markdown(table_of(report)),
    ]
    failed = [f"{cell}: {words}" for cell, words in report["failed"].items()]
    for title, problems in (("Missing", report["missing"]), ("Failed", failed), ("Left out", report["left_out"])):
        if problems:
            lines += ["", f"## {title}", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def as_markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of a Markdown table."""
    header, *rows = [f"| {' | '.join(row)} |" for row in table]
    return [header, "|" + "---|" * len(table[0]), *rows]


def _write_pictures(
    study: Study,
    by_point: Mapping[Point, Mapping[int, Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    compared = [row for row in rows if "against_plain" in row]
    if compared:
        plot_points({row["label"]: row["against_plain"] for row in compared}, folder / "points.png")
    curves = {point.label(study.base): next(iter(runs.values()))["curve"] for point, runs in by_point.items() if runs}
    if curves:
        plot_curves({label: {"train": curve} for label, curve in list(curves.items())[:6]}, folder / "curves.png")
    with_graphs = [runs for point, runs in by_point.items() if runs and not point.is_plain]
    if with_graphs:
        graphs = next(iter(with_graphs[0].values()))["graphs"]
        plot_graphs({name: torch.tensor(rows_) for name, rows_ in graphs.items()}, folder / "graphs.png")


def print_ablation(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The table, what is missing or failed, and where the report is; or the plan of a dry run."""
    console = console or Console()
    if "plan" in report:
        for line in report["plan"]:
            console.print(line, highlight=False)
        return
    header, *rows = table_of(report)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for cell, words in report["failed"].items():
        console.print(f"failed: {cell}: {words}", style="red", highlight=False, soft_wrap=True)
    console.print(f"Written to {(Path(report['output']) / 'report.md').resolve()}", highlight=False, soft_wrap=True)
