"""Capabilities of a model's routers, each with a reason: for refusals at run time and for the tables."""

from dataclasses import dataclass

from torch import nn

from symphony_hf.errors import UnsupportedModelError

from .discovery import FoundRouter, find_routers


@dataclass(frozen=True)
class Supported:
    """It works, and the tests hold it."""


@dataclass(frozen=True)
class Limited:
    """It works, but less than one might expect.

    Attributes:
        note: In what.
    """

    note: str


@dataclass(frozen=True)
class Unsupported:
    """It is refused, or cannot be.

    Attributes:
        reason: Why.
    """

    reason: str


Capability = Supported | Limited | Unsupported


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of `symphonize` for a model.

    Attributes:
        routers: Class names of its routers; empty where they cannot be patched.
        logits: Smoothing the logits, which folds.
        scores: Smoothing the scores, after softmax or sigmoid.
        learning: Whether training moves the graph.
    """

    routers: tuple[str, ...]
    logits: Capability
    scores: Capability
    learning: Capability


def capabilities(model: nn.Module) -> Capabilities:
    """Look at a model's routers and say what can be done with them, without changing anything.

    Args:
        model: Any model of transformers.
    """
    try:
        found = find_routers(model)
    except UnsupportedModelError as error:
        refused = Unsupported(str(error))
        return Capabilities((), refused, refused, refused)
    classes = tuple(sorted({type(router.module).__name__ for router in found}))
    return Capabilities(classes, Supported(), _scores(found), _learning(found))


def _scores(found: list[FoundRouter]) -> Capability:
    reasons = {router.contract.no_scoring_func for router in found if router.contract.scoring_func is None}
    return Unsupported(", ".join(sorted(reasons))) if reasons else Supported()


def _learning(found: list[FoundRouter]) -> Capability:
    if all(router.contract.top_k == 1 for router in found):
        return Limited("one expert per token: no two are chosen together, so the graph stays the identity")
    return Supported()
