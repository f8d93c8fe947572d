"""Sparse upcycling: dense checkpoints become MoE checkpoints, from file to file."""

from .exactness import Exactness
from .pipeline import UpcycleResult, upcycle
from .told import print_result

__all__ = ["Exactness", "UpcycleResult", "print_result", "upcycle"]
