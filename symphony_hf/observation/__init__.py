"""How a model routes real text: everything that `symphony routing` measures and draws."""

from .observe import observe_routing
from .pictures import captioned, draw_observation
from .settings import RoutingSettings
from .table import findings, layer_rows, print_observation

__all__ = [
    "RoutingSettings",
    "captioned",
    "draw_observation",
    "findings",
    "layer_rows",
    "observe_routing",
    "print_observation",
]
