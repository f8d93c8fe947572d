"""Files that were tampered with, by the thousand: each is loaded with valid graphs, or refused in our words."""

from .campaign import Outcome, fuzz, print_outcomes, try_case
from .specimens import make_specimens

__all__ = ["Outcome", "fuzz", "make_specimens", "print_outcomes", "try_case"]
