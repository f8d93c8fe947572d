"""Sparse upcycling: dense checkpoints become MoE checkpoints, from file to file."""

from .exactness import Exactness
from .upcycle import UpcycleResult, print_result, upcycle

__all__ = ["Exactness", "UpcycleResult", "print_result", "upcycle"]
