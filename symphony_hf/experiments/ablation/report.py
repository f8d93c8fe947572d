"""The report of a study: a table with intervals over seeds, comparisons with the plain system, and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from symphony_hf.evaluation.statistics import interval_text, t_interval
from symphony_hf.files import write_json, write_text
from symphony_hf.tables import Table

from .cells import Results, StudyRun, all_cells, chosen_rates, tuning_losses
from .comparison import (
    NO_VERDICT,
    WORD_MEASURES,
    Runs,
    compare,
    difference_text,
    find_sight,
    is_share,
    measures_of,
    null_of,
    sight_page,
    title_of,
    verdict_of,
)
from .graph_control import frozen_after
from .point import Point
from .study import Study

KEPT = (
    *("stage", "learning_rate", "train_seconds", "train_cpu_seconds", "tokens_per_cpu_second", "measure_seconds"),
    *("tokens", "parameters"),
)
"""Values of a run that the report lists besides its measures."""

ROUTING_STABILITY = (
    "Routing stability, or choices kept: the share of their experts that tokens keep under attack, over tokens that are "
    "not attacked themselves and have an attacked one before them in their row. Load entropy: the normalized entropy of the "
    "experts' load, 1 for an even load. A router that uses few experts is stable more easily, so read the two "
    "together."
)
"""Explanation of these columns."""

def write_ablation(study: Study, results: Results, failed: Mapping[StudyRun, str]) -> dict[str, Any]:
    """Write `report.json`, `report.md` and the pictures into the results' folder.

    Returns:
        The values of `report.json`.
    """
    rates = chosen_rates(study, results)
    cells = all_cells(study, rates)
    done = {cell: values for cell in cells if (values := results.load(cell)) is not None}
    by_point: dict[Point, dict[int, dict[str, Any]]] = {point: {} for point in study.points()}
    for cell, values in done.items():
        if cell.stage == "judge":
            by_point[cell.point][cell.seed] = values
    sight = find_sight(study, by_point)
    measures = measures_of(study)
    report: dict[str, Any] = {
        "sight": sight,
        "rows": [_row(study, point, by_point, sight) for point, runs in by_point.items() if runs],
        "tuning": _tuning(study, results, rates),
        "cells": [
            {
                "label": cell.point.label(study.base),
                "seed": cell.seed,
                **{name: values[name] for name in (*KEPT, *measures) if name in values},
            }
            for cell, values in done.items()
        ],
        "missing": [cell.label(study.base) for cell in cells if cell not in done],
        "left_out": study.left_out(),
        "failed": {cell.label(study.base): words for cell, words in failed.items()},
        "settings": {**_settings(study, by_point), "text": results.text_digest},
        "machines": list({str(values["machine"]): values["machine"] for values in done.values()}.values()),
        "command": study.command,
        "output": str(results.folder),
    }
    write_json(results.folder / "report.json", report)
    _write_pictures(study, by_point, report, results.folder)
    write_text(results.folder / "report.md", markdown(report))
    return report


def _settings(study: Study, by_point: Mapping[Point, Runs]) -> dict[str, Any]:
    recipe = study.recipe
    assert recipe.model.config is not None
    first: Mapping[str, Any] = next((runs[min(runs)] for runs in by_point.values() if runs), {})
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
        "tokenizer": recipe.data.tokenizer,
        "attack": {"rate": recipe.eval.attack_rate, "minimum": recipe.eval.attack_minimum, "seed": recipe.eval.seed},
        "damage": list(study.damage) if study.by_characters else None,
        "contamination": study.contamination,
        "pretraining_steps": None if study.pretraining is None else study.pretraining.max_steps,
        "learning_rates": list(study.learning_rates),
        "tuning_seeds": list(study.tuning_seeds),
        **{name: first.get(name) for name in ("test_tokens", "attacked_tokens", "reached_tokens")},
    }


def _start_left(study: Study, point: Point) -> float | None:
    """Return the weight of the initial identity in the final moving average; None without a moving average."""
    if point.is_plain or point.graph == "learned":
        return None
    return point.decay ** (frozen_after(point, study.steps) if point.graph == "frozen" else study.steps)


def _row(
    study: Study, point: Point, by_point: Mapping[Point, Runs], sight: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a point's means, and its comparisons by seed: with the plain system, with itself without a graph, and with
    its shuffled graph."""
    runs, measures = by_point[point], measures_of(study)
    row: dict[str, Any] = {"label": point.label(study.base), "point": dataclasses.asdict(point), "seeds": sorted(runs)}
    row["start_left"] = _start_left(study, point)
    row["learning_rate"] = runs[min(runs)].get("learning_rate")
    for name in measures:
        row[name] = dataclasses.asdict(t_interval([runs[seed][name] for seed in sorted(runs)]))
    others = {"against_plain": point.plain, "against_no_graph": point.without_graph}
    if point.graph == "ema":
        others["against_shuffled"] = dataclasses.replace(point, graph="random")
    if point.without_graph == point.plain:
        del others["against_no_graph"]
    for name, other in others.items():
        compared = compare(runs, by_point.get(other, {}), measures)
        if compared and other != point:
            row[name] = {
                measure: {
                    **dataclasses.asdict(interval),
                    "verdict": verdict_of(measure, interval, sight["measures"][measure]["visible"]),
                }
                for measure, interval in compared.items()
            }
    return row


def _tuning(study: Study, results: Results, rates: Mapping[Point, float]) -> list[dict[str, Any]]:
    """Return the mean loss of each point at each learning rate, and the chosen rate, as far as they were run."""
    tuned = []
    for point in study.points() if study.learning_rates else ():
        losses = {rate: tuning_losses(study, results, point, rate) for rate in study.learning_rates}
        means = {f"{rate:g}": sum(values) / len(values) for rate, values in losses.items() if values}
        tuned.append({"label": point.label(study.base), "losses": means, "chosen": rates.get(point)})
    return tuned


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the table of a study's points."""
    shown, compared = shown_measures(report), compared_measures(report)
    header = ["point", "seeds", *map(title_of, shown), *(f"{title_of(name)} against no graph" for name in compared)]
    rows = []
    for row in report["rows"]:
        cells = [row["label"], str(len(row["seeds"]))]
        cells += [_level_text(row[name], name) for name in shown]
        against = row.get("against_plain")
        for name in compared:
            cells.append(_verdict_text(against[name], name) if against else "")
        rows.append(cells)
    return Table("", header, rows)


_UNSHOWN = ("validation", "validation_loss", "untouched_clean", "untouched_attacked")
"""Measures that the table leaves out."""


def shown_measures(report: Mapping[str, Any]) -> list[str]:
    """Return the measures in the table of a report. Reports of earlier versions have those of words."""
    measures = report["sight"]["measures"] if "sight" in report else WORD_MEASURES
    return [name for name in measures if name not in _UNSHOWN]


def compared_measures(report: Mapping[str, Any]) -> list[str]:
    """Return the measures whose comparisons are in the table."""
    return [name for name in shown_measures(report) if name not in ("ratio", "load_entropy")]


def _level_text(values: Mapping[str, Any], measure: str) -> str:
    if is_share(measure):
        return interval_text(values, 2, 100, unit="%")
    return interval_text(values, {"clean": 2, "attacked": 2, "load_entropy": 3}.get(measure, 4))


def _verdict_text(values: Mapping[str, Any], measure: str) -> str:
    verdict = "" if values["verdict"] == NO_VERDICT else f", {values['verdict']}"
    return difference_text(values, measure) + verdict


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    settings = report["settings"]
    lines = [
        "# Ablation",
        "",
        *sight_page(report["sight"]),
        "",
        "## Points",
        "",
        f"{settings['tokens']:,} tokens per run, seeds {', '.join(map(str, settings['seeds']))}. "
        f"{_UNITS[settings['tokenizer']]} Means with 95% t-intervals over seeds in brackets; comparisons are paired by "
        "seed. Verdicts are not corrected for multiple comparisons: expect one in twenty to be chance.",
        "",
        ROUTING_STABILITY,
        "",
        table_of(report).to_markdown(),
        *_own_comparisons(report),
        *_tuning_page(report),
    ]
    failed = [f"{cell}: {words}" for cell, words in report["failed"].items()]
    for title, problems in (("Missing", report["missing"]), ("Failed", failed), ("Left out", report["left_out"])):
        if problems:
            lines += ["", f"## {title}", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


_UNITS = {
    "words": "Perplexities of the test text; comparisons are ratios, and below 1 is better.",
    "characters": "Nats per character of the test text, on damaged text of the characters left alone; comparisons are "
    "differences, and below 0 is better.",
}


def _own_comparisons(report: Mapping[str, Any]) -> list[str]:
    """Return the comparisons of forms with themselves without a graph, and with a shuffled one."""
    names = {"against_no_graph": "without a graph", "against_shuffled": "with its experts shuffled"}
    shown = compared_measures(report)
    rows = [
        [f"{row['label']}, against itself {label}", *(_verdict_text(row[key][name], name) for name in shown)]
        for row in report["rows"]
        for key, label in names.items()
        if key in row
    ]
    if not rows:
        return []
    return ["", "## Against themselves", "", Table("", ["point", *map(title_of, shown)], rows).to_markdown()]


def _tuning_page(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    if not report["tuning"]:
        return []
    rates = [f"{rate:g}" for rate in settings["learning_rates"]]
    rows = []
    for tuned in report["tuning"]:
        losses = [f"{tuned['losses'][rate]:.4f}" if rate in tuned["losses"] else "" for rate in rates]
        rows.append([tuned["label"], *losses, "" if tuned["chosen"] is None else f"{tuned['chosen']:g}"])
    return [
        "",
        "## Learning rates",
        "",
        f"Mean nats per token of held-out training text over seeds {', '.join(map(str, settings['tuning_seeds']))}, by "
        "learning rate. Each point was judged once, on the other seeds, at its chosen rate.",
        "",
        Table("", ["point", *rates, "chosen"], rows).to_markdown(),
    ]


def _write_pictures(
    study: Study,
    by_point: Mapping[Point, Mapping[int, Mapping[str, Any]]],
    report: Mapping[str, Any],
    folder: Path,
) -> None:
    from symphony_hf.diagnostics import plots  # matplotlib is slow to import

    compared = [row for row in report["rows"] if "against_plain" in row]
    if compared:
        panels = [
            (name, title_of(name), null_of(name), 100 if is_share(name) else 1) for name in compared_measures(report)
        ]
        plots.plot_points({row["label"]: row["against_plain"] for row in compared}, folder / "points.png", panels)
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
