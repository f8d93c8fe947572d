"""How a model holds up when its input is damaged, alone or against another one."""

from .evaluate import evaluate_robustness
from .settings import RobustnessSettings
from .tables import print_robustness, verdicts

__all__ = ["RobustnessSettings", "evaluate_robustness", "print_robustness", "verdicts"]
