"""The paper's claim on its graph, checked where the truth is known: planted communities of experts, and noise."""

from .benchmark import TheorySettings, run_theory
from .report import print_theory, theory_findings

__all__ = ["TheorySettings", "print_theory", "run_theory", "theory_findings"]
