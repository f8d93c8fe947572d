"""Capabilities of a model's routers, each with a reason: for refusals at run time and for the tables."""

from dataclasses import dataclass

from torch import nn

from symphony_hf.errors import UnsupportedModelError

from .discovery import FoundRouter, find_routers


@dataclass(frozen=True)
class Supported:
    """The capability works, and is tested."""


@dataclass(frozen=True)
class Limited:
    """The capability works with a limitation.

    Attributes:
        note: The limitation.
    """

    note: str


@dataclass(frozen=True)
class Unsupported:
    """The capability is refused or impossible.

    Attributes:
        reason: The reason.
    """

    reason: str


Capability = Supported | Limited | Unsupported


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of `symphonize` for a model.

    Attributes:
        routers: Class names of the routers; empty if they cannot be patched.
        logits: Smoothing of logits, which can be folded.
        scores: Smoothing of scores, after softmax or sigmoid.
        learning: Whether training moves the graph.
        gradient: A `router_gradient` of experts that were not chosen.
        bias: Balancing without a loss, by the bias with which experts are chosen.
    """

    routers: tuple[str, ...]
    logits: Capability
    scores: Capability
    learning: Capability
    gradient: Capability
    bias: Capability


def capabilities(model: nn.Module) -> Capabilities:
    """Inspect a model's routers and return what can be done with them. Nothing is changed.

    Args:
        model: Any model of transformers.
    """
    try:
        found = find_routers(model)
    except UnsupportedModelError as error:
        refused = Unsupported(str(error))
        return Capabilities((), refused, refused, refused, refused, refused)
    classes = tuple(sorted({type(router.module).__name__ for router in found}))
    return Capabilities(classes, Supported(), _scores(found), _learning(found), _gradient(found), _bias(found))


def _unless(reasons: set[str]) -> Capability:
    return Unsupported(", ".join(sorted(reasons))) if reasons else Supported()


def _scores(found: list[FoundRouter]) -> Capability:
    return _unless({router.contract.no_scoring_func for router in found if router.contract.scoring_func is None})


def _learning(found: list[FoundRouter]) -> Capability:
    if all(router.contract.top_k == 1 for router in found):
        return Limited("one expert per token: no two are chosen together, so the graph stays the identity")
    return Supported()


def _gradient(found: list[FoundRouter]) -> Capability:
    return _unless({router.contract.no_weighting for router in found if router.contract.weighting is None})


def _bias(found: list[FoundRouter]) -> Capability:
    without = sorted({type(r.module).__name__ for r in found if r.contract.correction_bias is None})
    return Unsupported(f"{', '.join(without)}: no bias to choose by") if without else Supported()
