"""Sparse upcycling: dense checkpoints become MoE checkpoints, from file to file."""

from .exactness import Exactness
from .pipeline import UpcycleResult, upcycle

__all__ = ["Exactness", "UpcycleResult", "upcycle"]
