"""How a model routes real text: everything that `symphony routing` measures and draws."""

from .observe import observe_routing
from .pictures import draw_observation
from .settings import RoutingSettings
from .table import print_observation

__all__ = ["RoutingSettings", "draw_observation", "observe_routing", "print_observation"]
