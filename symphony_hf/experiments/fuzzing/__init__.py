"""Fuzzing of checkpoints: a tampered file loads with valid graphs, or is refused by a SymphonyError."""

from .campaign import Outcome, fuzz, print_outcomes, try_case
from .specimens import make_specimens

__all__ = ["Outcome", "fuzz", "make_specimens", "print_outcomes", "try_case"]
