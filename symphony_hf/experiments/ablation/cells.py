"""The runs of a study, and their result files, named by a digest of everything that decides their numbers."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from symphony_hf.compat import __version__, transformers_version
from symphony_hf.files import write_json

from .point import Point
from .study import Study

_FORMAT = 4
"""Format of a run's result. Raise it when the same settings give other numbers."""

VERSIONS = {"symphony_hf": __version__, "torch": str(torch.__version__), "transformers": transformers_version()}
"""Versions that train a run. Runs of other versions are not mixed with these."""


Stage = Literal["pretrain", "tune", "judge"]


class StudyRun(NamedTuple):
    """A point of the study with a seed: one training run.

    Attributes:
        point: The point; for a pre-training, the plain model or a control.
        seed: Seed of weights, batches and dropout.
        stage: `pretrain`: trains a model that others fine-tune. `tune`: measured on held-out training text alone, for
            the choice of a learning rate. `judge`: measured on the test text.
        rate: Learning rate; the recipe's when None.
    """

    point: Point
    seed: int
    stage: Stage = "judge"
    rate: float | None = None

    def name(self, identity: str) -> str:
        """Return the stem of its files' names."""
        kind = self.point.graph if self.point.control == "none" else self.point.control
        parts = [self.point.system, kind, *(() if self.stage == "judge" else (self.stage,)), f"seed{self.seed}"]
        return "-".join([*parts, identity])

    def label(self, base: Point) -> str:
        """Return the point, and what differs from a judged run at the recipe's learning rate."""
        stage = {"pretrain": ", pre-training", "tune": ", tuning", "judge": ""}[self.stage]
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.point.label(base)}{stage}{rate}, seed {self.seed}"


Rates = Mapping[Point, float | None]
"""Chosen learning rates of the points whose tuning is done; None for a point that diverged at every rate."""


def cells_of(study: Study, rates: Rates | None = None) -> list[StudyRun]:
    """Return all judged runs, the systems' pairs first, seed by seed, so that an interrupted study has whole pairs.

    Args:
        study: The study.
        rates: Chosen learning rates; points without one are left out if the study tunes them.
    """
    points = study.points()
    if study.learning_rates:
        points = [point for point in points if (rates or {}).get(point) is not None]
    pairs = [point for point in points if point.is_plain or point == _base_of(study, point)]
    others = [point for point in points if point not in pairs]
    return [
        StudyRun(point, seed, rate=(rates or {}).get(point))
        for group in (pairs, others)
        for seed in study.seeds
        for point in group
    ]


def tuning_cells(study: Study) -> list[StudyRun]:
    """Return the runs that choose the learning rates: each point at each rate with each of the tuning seeds."""
    return [
        StudyRun(point, seed, "tune", rate)
        for point in study.points()
        for rate in study.learning_rates
        for seed in study.tuning_seeds
    ]


def pretraining_of(study: Study, cell: StudyRun) -> StudyRun | None:
    """Return the run that trains the model which a run fine-tunes; None without pre-training.

    It is a plain model, or that of the run's own control.
    """
    if study.pretraining is None or cell.stage == "pretrain":
        return None
    point = cell.point if cell.point.control != "none" else cell.point.plain
    return StudyRun(
        dataclasses.replace(point, damage=0.0, selection="top_k", router_gradient="chosen").canonical(),
        cell.seed,
        "pretrain",
    )


def _base_of(study: Study, point: Point) -> Point:
    return dataclasses.replace(study.base, system=point.system).canonical()


def digest_of(study: Study, cell: StudyRun, text_digest: str) -> str:
    """Return 16 hexadecimal digits that identify everything that decides a run's numbers."""
    recipe = study.recipe
    assert recipe.symphony is not None
    steps = study.steps
    if cell.stage == "pretrain":
        assert study.pretraining is not None
        steps = study.pretraining.max_steps
    first = pretraining_of(study, cell)
    train = {"learning_rate": cell.rate or study.learning_rate, "warmup_steps": study.warmup_steps}
    identity = {
        "format": _FORMAT,
        "versions": VERSIONS,
        "point": dataclasses.asdict(cell.point),
        "seed": cell.seed,
        "stage": cell.stage,
        "pretraining": None if first is None else digest_of(study, first, text_digest),
        "model": recipe.model.config,
        "symphony": cell.point.symphony(recipe.symphony).to_dict(),
        "train": {**train, "steps": steps, "rows": study.batch_size, "block_size": recipe.data.block_size},
        "text": text_digest,
    }
    if study.contamination and cell.stage != "pretrain":  # studies with and without it share their pre-training
        identity["contamination"] = [study.contamination, recipe.eval.seed]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """A folder with one file per finished run.

    Args:
        folder: The folder, created on the first write.
        study: The study of these runs.
        text_digest: Digest of its text.
    """

    def __init__(self, folder: Path, study: Study, text_digest: str) -> None:
        self.folder, self.study, self.text_digest = folder, study, text_digest

    def path(self, cell: StudyRun) -> Path:
        """Return the path of a run's result."""
        return self.folder / "cells" / f"{cell.name(digest_of(self.study, cell, self.text_digest))}.json"

    def checkpoint(self, cell: StudyRun) -> Path:
        """Return the path of a pre-trained model's weights."""
        return self.folder / "pretrained" / f"{self.path(cell).stem}.safetensors"

    def log(self, cell: StudyRun) -> Path:
        """Return the path of a run's log."""
        return self.folder / "logs" / f"{self.path(cell).stem}.log"

    def load(self, cell: StudyRun) -> dict[str, Any] | None:
        """Return a run's result; None if it has none yet."""
        path = self.path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def has(self, cell: StudyRun) -> bool:
        """Whether a run is done: it has a result, and a pre-training its weights, too."""
        return self.path(cell).is_file() and (cell.stage != "pretrain" or self.checkpoint(cell).is_file())

    def save(self, cell: StudyRun, values: dict[str, Any]) -> None:
        """Write a run's result atomically."""
        write_json(self.path(cell), {"point": dataclasses.asdict(cell.point), "seed": cell.seed, **values})


def all_cells(study: Study, rates: Rates) -> list[StudyRun]:
    """Return the runs of all stages, as far as their learning rates are known, in the order of the stages."""
    cells = [*tuning_cells(study), *cells_of(study, rates)]
    first = [run for cell in cells if (run := pretraining_of(study, cell)) is not None]
    return [*dict.fromkeys(first), *cells]


def chosen_rates(study: Study, results: Results) -> dict[Point, float | None]:
    """Return the learning rate of each point whose tuning runs are all done: that of the lowest mean loss.

    A rate at which a run diverged is not taken; None if all are such.
    """
    chosen: dict[Point, float | None] = {}
    for point in study.points() if study.learning_rates else ():
        means = tuning_means(study, results, point)
        if len(means) == len(study.learning_rates):
            best = min(means, key=lambda rate: (means[rate], rate))
            chosen[point] = best if math.isfinite(means[best]) else None
    return chosen


def tuning_means(study: Study, results: Results, point: Point) -> dict[float, float]:
    """Return a point's mean validation loss at each learning rate whose tuning runs are all done.

    It is infinite if one of them diverged.
    """
    means = {}
    for rate in study.learning_rates:
        runs = [run for seed in study.tuning_seeds if (run := results.load(StudyRun(point, seed, "tune", rate)))]
        if len(runs) == len(study.tuning_seeds):
            losses = [math.inf if run["validation_loss"] is None else run["validation_loss"] for run in runs]
            means[rate] = sum(losses) / len(losses)
    return means


def never_trained(study: Study, rates: Rates) -> list[str]:
    """Return a line for each point that diverged at every learning rate, so that it is never judged."""
    return [f"{point.label(study.base)}: at every learning rate" for point, rate in rates.items() if rate is None]


def describe_plan(study: Study, results: Results, seconds_per_cell: float, workers: int) -> list[str]:
    """Describe the plan of a study, line by line.

    Args:
        study: The study.
        results: Results of finished runs.
        seconds_per_cell: Measured seconds of one run.
        workers: Number of parallel processes.
    """
    rates = chosen_rates(study, results)
    unknown = [point for point in study.points() if study.learning_rates and point not in rates]
    coming = [StudyRun(point, seed) for point in unknown for seed in study.seeds]
    first = [run for cell in coming if (run := pretraining_of(study, cell)) is not None]
    cells = list(dict.fromkeys([*first, *all_cells(study, rates)]))
    needed = {pretraining_of(study, cell) for cell in (*cells, *coming) if results.load(cell) is None}
    waiting = [cell for cell in cells if not results.has(cell) and (cell.stage != "pretrain" or cell in needed)]
    lines = [
        f"{len(study.points())} points, {len(study.seeds)} seeds: {len(cells) + len(coming)} runs of {study.tokens:,} "
        f"tokens ({study.steps:,} steps); {len(cells) - len(waiting)} are done"
    ]
    for cell in cells:
        mark = "waiting" if cell in waiting else "done   "
        lines.append(f"  {mark}  {cell.label(study.base)}")
    if coming:
        lines.append(f"  waiting  {len(coming)} runs at learning rates that are not chosen yet")
    lines += [f"  diverged {line}" for line in never_trained(study, rates)]
    lines += [f"  left out {combination}" for combination in study.left_out()]
    hours = sum(relative_cost(study, cell) for cell in (*waiting, *coming)) * seconds_per_cell / workers / 3600
    lines.append(
        f"About {seconds_per_cell:.0f} s per run, {hours:.1f} hours for {len(waiting) + len(coming)} of them, "
        f"{workers} at a time"
    )
    return lines


def relative_cost(study: Study, cell: StudyRun) -> float:
    """Return the steps of a run, relative to those of one that is judged."""
    if cell.stage != "pretrain" or study.pretraining is None:
        return 1.0
    return study.pretraining.max_steps / study.steps
