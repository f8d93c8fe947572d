"""From a study to its cells, each under a digest of what decides its numbers."""

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
"""Of a cell's result. Raise it when the same settings should give other numbers."""

VERSIONS = {"symphony_hf": __version__, "torch": str(torch.__version__), "transformers": transformers_version()}
"""What trains a cell: another one's cells are not mixed with these."""


class Cell(NamedTuple):
    """A point with a seed."""

    point: Point
    seed: int

    def name(self, identity: str) -> str:
        """Of its files."""
        return f"{self.point.system}-{self.point.graph}-seed{self.seed}-{identity}"


def cells_of(study: Study) -> list[Cell]:
    """All cells, the systems' pairs first; seed by seed, so that a part of the grid is a whole one."""
    points = study.points()
    pairs = [point for point in points if point.is_plain or point == _base_of(study, point)]
    others = [point for point in points if point not in pairs]
    return [Cell(point, seed) for group in (pairs, others) for seed in study.seeds for point in group]


def _base_of(study: Study, point: Point) -> Point:
    return dataclasses.replace(study.base, system=point.system).canonical()


def digest_of(study: Study, cell: Cell, text_digest: str) -> str:
    """What decides a cell's numbers, in 16 letters."""
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
        "train": {**train, "steps": study.steps, "rows": study.rows, "block_size": recipe.data.block_size},
        "text": text_digest,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """A folder with one file a finished cell.

    Args:
        folder: Made when something is written.
        study: Whose cells they are.
        text_digest: Of its text.
    """

    def __init__(self, folder: Path, study: Study, text_digest: str) -> None:
        self.folder, self.study, self.text_digest = folder, study, text_digest

    def path(self, cell: Cell) -> Path:
        """Of a cell's result."""
        return self.folder / "cells" / f"{cell.name(digest_of(self.study, cell, self.text_digest))}.json"

    def log(self, cell: Cell) -> Path:
        """What a cell's process says."""
        return self.folder / "logs" / f"{self.path(cell).stem}.log"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result; None where there is none."""
        path = self.path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, cell: Cell, values: dict[str, Any]) -> None:
        """Keep a cell's result: the whole of it is there, or nothing."""
        write_json(self.path(cell), {"point": dataclasses.asdict(cell.point), "seed": cell.seed, **values})


def describe_plan(study: Study, results: Results, seconds_per_cell: float, workers: int) -> list[str]:
    """What would be run, line by line.

    Args:
        study: The study.
        results: What is there already.
        seconds_per_cell: As measured, of one worker.
        workers: Processes at a time.
    """
    cells = cells_of(study)
    waiting = [cell for cell in cells if results.load(cell) is None]
    lines = [
        f"{len(study.points())} points, {len(study.seeds)} seeds: {len(cells)} cells of {study.tokens:,} tokens "
        f"({study.steps:,} steps); {len(cells) - len(waiting)} are done"
    ]
    for cell in cells:
        mark = "waiting" if cell in waiting else "done   "
        lines.append(f"  {mark}  {cell.point.label(study.base)}, seed {cell.seed}")
    lines += [f"  left out {combination}" for combination in study.left_out()]
    hours = len(waiting) * seconds_per_cell / workers / 3600
    lines.append(
        f"About {seconds_per_cell:.0f} s a cell, {hours:.1f} hours for {len(waiting)} of them, {workers} at a time"
    )
    return lines
