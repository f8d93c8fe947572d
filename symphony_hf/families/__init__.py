"""What a family's router looks like: found from the model class, checked by running it."""

from .contract import RouterContract, inspect_router, router_weight_shape
from .discovery import FoundRouter, find_routers

__all__ = ["FoundRouter", "RouterContract", "find_routers", "inspect_router", "router_weight_shape"]
