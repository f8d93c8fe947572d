"""Ablation studies: a grid of small training runs around a base point, each in a process of its own."""

from .cells import StudyRun, cells_of, describe_plan
from .point import SYSTEMS, Point
from .report import print_ablation
from .run import run_ablation
from .study import Study, load_study

__all__ = [
    "SYSTEMS",
    "Point",
    "Study",
    "StudyRun",
    "cells_of",
    "describe_plan",
    "load_study",
    "print_ablation",
    "run_ablation",
]
