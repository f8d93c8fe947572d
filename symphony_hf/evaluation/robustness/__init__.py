"""Robustness of a model to attacks on its inputs, alone or against another model."""

from .evaluate import evaluate_robustness
from .settings import RobustnessSettings
from .tables import print_robustness, verdicts

__all__ = ["RobustnessSettings", "evaluate_robustness", "print_robustness", "verdicts"]
