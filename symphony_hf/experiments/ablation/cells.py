"""The runs of a study, and their result files, named by a digest of everything that decides their numbers."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from symphony_hf.compat import __version__, transformers_version
from symphony_hf.files import write_json

from .point import Point
from .study import Study

_FORMAT = 3
"""Format of a run's result. Raise it when the same settings give other numbers."""

VERSIONS = {"symphony_hf": __version__, "torch": str(torch.__version__), "transformers": transformers_version()}
"""Versions that train a run. Runs of other versions are not mixed with these."""


class StudyRun(NamedTuple):
    """A point of the study with a seed: one training run."""

    point: Point
    seed: int

    def name(self, identity: str) -> str:
        """Return the stem of its files' names."""
        return f"{self.point.system}-{self.point.graph}-seed{self.seed}-{identity}"


def cells_of(study: Study) -> list[StudyRun]:
    """Return all runs, the systems' pairs first and seed by seed, so that an interrupted study has whole pairs."""
    points = study.points()
    pairs = [point for point in points if point.is_plain or point == _base_of(study, point)]
    others = [point for point in points if point not in pairs]
    return [StudyRun(point, seed) for group in (pairs, others) for seed in study.seeds for point in group]


def _base_of(study: Study, point: Point) -> Point:
    return dataclasses.replace(study.base, system=point.system).canonical()


def digest_of(study: Study, cell: StudyRun, text_digest: str) -> str:
    """Return 16 hexadecimal digits that identify everything that decides a run's numbers."""
    recipe = study.recipe
    assert recipe.symphony is not None
    train = {"learning_rate": study.learning_rate, "warmup_steps": study.warmup_steps}
    identity = {
        "format": _FORMAT,
        "versions": VERSIONS,
        "point": dataclasses.asdict(cell.point),
        "seed": cell.seed,
        "model": recipe.model.config,
        "symphony": cell.point.symphony(recipe.symphony).to_dict(),
        "train": {**train, "steps": study.steps, "rows": study.batch_size, "block_size": recipe.data.block_size},
        "text": text_digest,
    }
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

    def log(self, cell: StudyRun) -> Path:
        """Return the path of a run's log."""
        return self.folder / "logs" / f"{self.path(cell).stem}.log"

    def load(self, cell: StudyRun) -> dict[str, Any] | None:
        """Return a run's result; None if it has none yet."""
        path = self.path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, cell: StudyRun, values: dict[str, Any]) -> None:
        """Write a run's result atomically."""
        write_json(self.path(cell), {"point": dataclasses.asdict(cell.point), "seed": cell.seed, **values})


def describe_plan(study: Study, results: Results, seconds_per_cell: float, workers: int) -> list[str]:
    """Describe the plan of a study, line by line.

    Args:
        study: The study.
        results: Results of finished runs.
        seconds_per_cell: Measured seconds of one run.
        workers: Number of parallel processes.
    """
    cells = cells_of(study)
    waiting = [cell for cell in cells if results.load(cell) is None]
    lines = [
        f"{len(study.points())} points, {len(study.seeds)} seeds: {len(cells)} runs of {study.tokens:,} tokens "
        f"({study.steps:,} steps); {len(cells) - len(waiting)} are done"
    ]
    for cell in cells:
        mark = "waiting" if cell in waiting else "done   "
        lines.append(f"  {mark}  {cell.point.label(study.base)}, seed {cell.seed}")
    lines += [f"  left out {combination}" for combination in study.left_out()]
    hours = len(waiting) * seconds_per_cell / workers / 3600
    lines.append(
        f"About {seconds_per_cell:.0f} s per run, {hours:.1f} hours for {len(waiting)} of them, {workers} at a time"
    )
    return lines
