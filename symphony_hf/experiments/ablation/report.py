"""The report of a study: a table with intervals over seeds, comparisons with the plain system, and pictures."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from symphony_hf.evaluation.statistics import t_interval
from symphony_hf.files import write_json, write_text

from .cells import Rates, Results, StudyRun, all_cells, chosen_rates, never_trained, tuning_means
from .comparison import (
    DIVERGED,
    Runs,
    compare,
    find_sight,
    is_given,
    is_share,
    measures_of,
    null_of,
    smallest_told,
    title_of,
    verdict_of,
)
from .graph_control import frozen_after
from .page import compared_measures, markdown, plain_name
from .point import Point
from .study import Study

PAGE, CURVES, GRAPHS, POINTS = "report.md", "curves.png", "graphs.png", "points.png"
"""Files beside `report.json`."""

KEPT = (
    *("stage", "learning_rate", "train_seconds", "train_cpu_seconds", "tokens_per_cpu_second", "measure_seconds"),
    *("tokens", "parameters"),
)
"""Values of a run that the report lists besides its measures."""


def write_ablation(study: Study, results: Results, failed: Mapping[StudyRun, str]) -> dict[str, Any]:
    """Write `report.json`, `report.md` and the pictures into the results' folder.

    Returns:
        The values of `report.json`.
    """
    rates = chosen_rates(study, results)
    cells = all_cells(study, rates)
    done = {cell: values for cell in cells if (values := results.load(cell)) is not None}
    by_point: dict[Point, dict[int, dict[str, Any]]] = {point: {} for point in study.points()}
    judged = {cell: values for cell, values in done.items() if cell.stage == "judge"}
    for cell, values in judged.items():
        if "diverged" not in values:
            by_point[cell.point][cell.seed] = values
    diverged = [cell for cell, values in judged.items() if "diverged" in values]
    with_diverged = {cell.point for cell in diverged}
    sight = find_sight(study, by_point, with_diverged)
    measures = measures_of(study)
    report: dict[str, Any] = {
        "sight": sight,
        "rows": [_row(study, point, by_point, sight, with_diverged) for point, runs in by_point.items() if runs],
        "tuning": _tuning(study, results, rates),
        "cells": [
            {
                "label": cell.point.label(study.base),
                "seed": cell.seed,
                **{name: values[name] for name in (*KEPT, *measures) if name in values},
            }
            for cell, values in done.items()
        ],
        "diverged": [*(cell.label(study.base) for cell in diverged), *never_trained(study, rates)],
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
    write_text(results.folder / PAGE, markdown(report))
    return report


def _settings(study: Study, by_point: Mapping[Point, Runs]) -> dict[str, Any]:
    recipe = study.recipe
    assert recipe.model.config is not None
    first: Mapping[str, Any] = next((runs[min(runs)] for runs in by_point.values() if runs), {})
    # Runs of earlier versions do not have it.
    sizes = [run["vocab_size"] for runs in by_point.values() for run in runs.values() if "vocab_size" in run]
    return {
        "title": study.title,
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
        "vocab_size": recipe.data.vocab_size,  # at most, by the recipe
        "text_vocab_size": sizes[0] if sizes else None,
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
    study: Study, point: Point, by_point: Mapping[Point, Runs], sight: Mapping[str, Any], diverged: set[Point]
) -> dict[str, Any]:
    """Return a point's means, and its comparisons by seed: with the plain system, with itself without a graph, with its
    shuffled graph, and with random experts in place of neighbours. Runs that diverged are missing, so a point with one
    gets no other verdict."""
    runs, measures = by_point[point], measures_of(study)
    row: dict[str, Any] = {"label": point.label(study.base), "point": dataclasses.asdict(point), "seeds": sorted(runs)}
    row["start_left"] = _start_left(study, point)
    row["learning_rate"] = runs[min(runs)].get("learning_rate")
    for name in measures:
        row[name] = dataclasses.asdict(t_interval([runs[seed][name] for seed in sorted(runs)]))
    others = {"against_plain": point.plain, "against_no_graph": point.without_graph}
    if point.graph == "ema":
        others["against_shuffled"] = dataclasses.replace(point, graph="random")
    if point.router_gradient == "neighbours":
        others["against_random"] = dataclasses.replace(point, router_gradient="random").canonical()
    if point.differs_by_graph:
        del others["against_no_graph"]
    for name, other in others.items():
        compared = compare(runs, by_point.get(other, {}), measures)
        if not compared or other == point:
            continue
        row[name] = {}
        for measure, interval in compared.items():
            is_visible = sight["measures"][measure]["visible"] and not is_given(measure, point.control)
            row[name][measure] = {
                **dataclasses.asdict(interval),
                "smallest": smallest_told([(runs, by_point[other])], measure),
                "verdict": DIVERGED if diverged & {point, other} else verdict_of(measure, interval, is_visible),
            }
    return row


def _tuning(study: Study, results: Results, rates: Rates) -> list[dict[str, Any]]:
    """Return the mean loss of each point at each learning rate, and the chosen rate, as far as they were run."""
    tuned = []
    for point in study.points() if study.learning_rates else ():
        means = {f"{rate:g}": mean for rate, mean in tuning_means(study, results, point).items()}
        tuned.append({"label": point.label(study.base), "losses": means, "chosen": rates.get(point)})
    return tuned


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
            (name, f"{title_of(name)}\nagainst {plain_name(report)}", null_of(name), 100 if is_share(name) else 1)
            for name in compared_measures(report)
        ]
        plots.plot_points({row["label"]: row["against_plain"] for row in compared}, folder / POINTS, panels)
    curves = {
        f"{point.label(study.base)}, seed {min(runs)}": runs[min(runs)]["curve"]
        for point, runs in by_point.items()
        if runs
    }
    if curves:
        plots.plot_curves({label: {"train": curve} for label, curve in list(curves.items())[:6]}, folder / CURVES)
    with_graphs = [runs for point, runs in by_point.items() if runs and not point.is_plain]
    if with_graphs:
        graphs = next(iter(with_graphs[0].values()))["graphs"]
        plots.plot_graphs({name: torch.tensor(rows_) for name, rows_ in graphs.items()}, folder / GRAPHS)
