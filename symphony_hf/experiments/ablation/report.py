"""The report of a study: a table with intervals over seeds, comparisons with the plain system, and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from symphony_hf.evaluation.statistics import SeedInterval, interval_text, paired_ratio, t_interval
from symphony_hf.files import write_json, write_text
from symphony_hf.tables import Table

from .cells import Results, StudyRun, cells_of
from .point import Point
from .study import Study
from .train import frozen_after

PERPLEXITIES = ("validation", "clean", "attacked", "ratio", "untouched_clean", "untouched_attacked")
"""Measures compared by ratios."""
SHARES = ("routing_kept", "load_entropy")
"""Measures compared by differences."""
MEASURES = (*PERPLEXITIES, *SHARES)
KEPT = (
    *MEASURES,
    *("train_seconds", "train_cpu_seconds", "tokens_per_cpu_second", "measure_seconds", "tokens", "parameters"),
)
"""Values of a run that the report lists."""

ROUTING_STABILITY = (
    "Routing stability: the share of their experts that words keep under attack, over words that are not attacked "
    "themselves and have an attacked word before them in their row. Load entropy: the normalized entropy of the "
    "experts' load, 1 for an even load. A router that uses few experts is stable more easily, so read the two "
    "together."
)
"""Explanation of these columns."""

HEADER = (
    *("point", "seeds", "clean", "attacked", "attacked / clean", "routing stability", "load entropy"),
    *("clean against no graph", "attacked against no graph", "routing stability against no graph"),
)


def write_ablation(study: Study, results: Results, failed: Mapping[StudyRun, str]) -> dict[str, Any]:
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
        "rows": [_row(study, point, by_point) for point, runs in by_point.items() if runs],
        "cells": [
            {"label": cell.point.label(study.base), "seed": cell.seed, **{name: values[name] for name in KEPT}}
            for cell, values in done.items()
        ],
        "missing": [f"{cell.point.label(study.base)}, seed {cell.seed}" for cell in cells if cell not in done],
        "left_out": study.left_out(),
        "failed": {f"{cell.point.label(study.base)}, seed {cell.seed}": words for cell, words in failed.items()},
        "settings": {**_settings(study, done.values()), "text": results.text_digest},
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
        "rows": study.batch_size,
        "block_size": recipe.data.block_size,
        "vocab_size": recipe.data.vocab_size,
        "learning_rate": study.learning_rate,
        "warmup_steps": study.warmup_steps,
        "attack": {"rate": recipe.eval.attack_rate, "minimum": recipe.eval.attack_minimum, "seed": recipe.eval.seed},
        **{name: first.get(name) for name in ("test_tokens", "attacked_tokens", "reached_tokens")},
    }


def _start_left(study: Study, point: Point) -> float | None:
    """Return the weight of the initial identity in the final moving average; None without a moving average."""
    if point.is_plain or point.graph == "learned":
        return None
    return point.decay ** (frozen_after(point, study.steps) if point.graph == "frozen" else study.steps)


Runs = Mapping[int, Mapping[str, Any]]
"""Finished runs of a point, by seed."""


def _row(study: Study, point: Point, by_point: Mapping[Point, Runs]) -> dict[str, Any]:
    """Return a point's means, and its comparisons by seed with the plain system and with its shuffled graph."""
    runs = by_point[point]
    row: dict[str, Any] = {"label": point.label(study.base), "point": dataclasses.asdict(point), "seeds": sorted(runs)}
    row["start_left"] = _start_left(study, point)
    for name in MEASURES:
        row[name] = dataclasses.asdict(t_interval([runs[seed][name] for seed in sorted(runs)]))
    others = {"against_plain": point.plain}
    if point.graph == "ema":
        others["against_shuffled"] = dataclasses.replace(point, graph="random")
    for name, other in others.items():
        shared = sorted(runs.keys() & by_point.get(other, {}).keys())
        if shared and not point.is_plain:
            row[name] = _compare([runs[seed] for seed in shared], [by_point[other][seed] for seed in shared])
    return row


def _compare(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each measure's interval and verdict, paired by seed."""
    compared = {}
    for name in MEASURES:
        a, b = ([run[name] for run in group] for group in (runs, others))
        differences = [x - y for x, y in zip(a, b, strict=True)]
        interval = paired_ratio(a, b) if name in PERPLEXITIES else t_interval(differences)
        compared[name] = {**dataclasses.asdict(interval), "verdict": _verdict(name, interval)}
    return compared


def _verdict(name: str, interval: SeedInterval) -> str:
    """Return the verdict of one comparison, without a correction for multiple comparisons."""
    if interval.low is None:
        return "one seed"
    null = 1.0 if name in PERPLEXITIES else 0.0
    if not interval.excludes(null):
        return "not distinguishable"
    is_higher = interval.estimate > null
    if name == "load_entropy":
        return "higher" if is_higher else "lower"  # neither is better in itself
    return "better" if is_higher == (name == "routing_kept") else "worse"


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the table of a study's points."""
    rows = []
    for row in report["rows"]:
        cells = [row["label"], str(len(row["seeds"]))]
        cells += [interval_text(row[name], digits) for name, digits in (("clean", 2), ("attacked", 2), ("ratio", 4))]
        cells.append(interval_text(row["routing_kept"], 2, 100, unit="%"))
        cells.append(interval_text(row["load_entropy"], 3))
        against = row.get("against_plain")
        for name in ("clean", "attacked", "routing_kept"):
            cells.append(f"{difference_text(against[name], name)}, {against[name]['verdict']}" if against else "")
        rows.append(cells)
    return Table("", HEADER, rows)


def difference_text(values: Mapping[str, Any], measure: str) -> str:
    """Format a comparison of a measure: a ratio, a difference, or a difference of shares in points."""
    if measure == "routing_kept":
        return f"{interval_text(values, 2, 100, '+')} points"
    return interval_text(values, 4, sign="+" if measure == "load_entropy" else "")


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    settings = report["settings"]
    lines = [
        "# Ablation",
        "",
        f"{settings['tokens']:,} tokens per run, seeds {', '.join(map(str, settings['seeds']))}. Perplexities of the "
        "test text, with 95% t-intervals over seeds in brackets. Ratios to the same system without a graph are paired "
        "by seed; below 1 is better. Verdicts are not corrected for multiple comparisons: expect one in twenty to be "
        "chance.",
        "",
        ROUTING_STABILITY,
        "",
        table_of(report).to_markdown(),
    ]
    failed = [f"{cell}: {words}" for cell, words in report["failed"].items()]
    for title, problems in (("Missing", report["missing"]), ("Failed", failed), ("Left out", report["left_out"])):
        if problems:
            lines += ["", f"## {title}", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def _write_pictures(
    study: Study,
    by_point: Mapping[Point, Mapping[int, Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    from symphony_hf.diagnostics import plots  # matplotlib is slow to import

    compared = [row for row in rows if "against_plain" in row]
    if compared:
        plots.plot_points({row["label"]: row["against_plain"] for row in compared}, folder / "points.png")
    curves = {
        f"{point.label(study.base)}, seed {min(runs)}": runs[min(runs)]["curve"]
        for point, runs in by_point.items()
        if runs
    }
    if curves:
        plots.plot_curves({label: {"train": curve} for label, curve in list(curves.items())[:6]}, folder / "curves.png")
    with_graphs = [runs for point, runs in by_point.items() if runs and not point.is_plain]
    if with_graphs:
        graphs = next(iter(with_graphs[0].values()))["graphs"]
        plots.plot_graphs({name: torch.tensor(rows_) for name, rows_ in graphs.items()}, folder / "graphs.png")


def print_ablation(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, the failed runs and the path of the report; or the plan of a dry run."""
    console = console or Console()
    if "plan" in report:
        for line in report["plan"]:
            console.print(line, highlight=False)
        return
    table_of(report).print(console)
    for cell, words in report["failed"].items():
        console.print(f"failed: {cell}: {words}", style="red", highlight=False, soft_wrap=True)
    console.print(f"Written to {(Path(report['output']) / 'report.md').resolve()}", highlight=False, soft_wrap=True)
