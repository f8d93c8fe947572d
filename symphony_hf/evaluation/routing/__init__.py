"""Routing diagnostics on real text, which `symphony routing` measures and draws."""

from .drop_first_expert import first_expert_dropped
from .expert_outputs import ExpertSample, sampling_experts
from .hooks import Routed, WatchedRouter, routers_to_watch, watching_routers
from .observe import observe_routing
from .pictures import captioned, draw_observation
from .settings import RoutingSettings
from .tables import findings, layer_rows, print_observation

__all__ = [
    "RoutingSettings",
    "captioned",
    "draw_observation",
    "findings",
    "layer_rows",
    "observe_routing",
    "print_observation",
]


__all__ = [
    "ExpertSample",
    "Routed",
    "WatchedRouter",
    "first_expert_dropped",
    "routers_to_watch",
    "sampling_experts",
    "watching_routers",
]
