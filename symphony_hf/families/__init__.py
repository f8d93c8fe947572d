"""What a family's router looks like: found from the model class, checked by running it."""

from .capability import Capabilities, Capability, Limited, Supported, Unsupported, capabilities
from .contract import RouterContract
from .discovery import FoundRouter, find_routers
from .gates import routers_of
from .inspection import inspect_router
from .probe import WRONG_INPUT, LinearSpy, Probe, as_tuple
from .substitution import (
    LinearStandIn,
    OutputStandIn,
    StandIn,
    is_plain_linear,
    linear_of,
    stand_in_class,
    substitute,
    substitute_logits,
)
from .twin import full_shape, same_draws

__all__ = [
    "WRONG_INPUT",
    "Capabilities",
    "Capability",
    "FoundRouter",
    "Limited",
    "LinearSpy",
    "LinearStandIn",
    "OutputStandIn",
    "Probe",
    "RouterContract",
    "StandIn",
    "Supported",
    "Unsupported",
    "as_tuple",
    "capabilities",
    "find_routers",
    "full_shape",
    "inspect_router",
    "is_plain_linear",
    "linear_of",
    "routers_of",
    "same_draws",
    "stand_in_class",
    "substitute",
    "substitute_logits",
]
