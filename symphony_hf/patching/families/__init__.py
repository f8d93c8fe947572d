"""Properties of a family's router: found from the model class, and checked by running it."""

from .capability import Capabilities, Capability, Limited, Supported, Unsupported, capabilities
from .contract import RouterContract
from .discovery import FoundRouter, find_routers
from .inspection import inspect_router
from .named_gates import routers_of
from .probe import WRONG_INPUT, LinearSpy, Probe, as_tuple, full_shape, same_draws
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
