"""The paper's claim about its graph, tested on planted communities of experts under noise."""

from .benchmark import TheorySettings, run_theory
from .report import print_theory, theory_findings

__all__ = ["TheorySettings", "print_theory", "run_theory", "theory_findings"]
