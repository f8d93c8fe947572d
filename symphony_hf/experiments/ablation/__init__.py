"""Ablations: a grid of small training runs around a base point, each a process of its own, and what came out."""

from .cells import Cell, cells_of, describe_plan
from .point import SYSTEMS, Point
from .report import print_ablation
from .run import run_ablation
from .study import Study, load_study

__all__ = [
    "SYSTEMS",
    "Cell",
    "Point",
    "Study",
    "cells_of",
    "describe_plan",
    "load_study",
    "print_ablation",
    "run_ablation",
]
