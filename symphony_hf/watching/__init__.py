"""Watch a model route: what its routers really choose, what its experts make of it, and what a missing expert costs.

For every model whose routers discovery knows, symphonized or not, by hooks that are gone afterwards.
"""

from .dropping import first_expert_dropped
from .experts import ExpertSample, sampling_experts
from .routers import Routed, WatchedRouter, routers_to_watch, watching_routers

__all__ = [
    "ExpertSample",
    "Routed",
    "WatchedRouter",
    "first_expert_dropped",
    "routers_to_watch",
    "sampling_experts",
    "watching_routers",
]
