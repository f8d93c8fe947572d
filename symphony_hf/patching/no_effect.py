"""Warnings about models and settings with which the graph, or a setting, has no effect or a useless one."""

import logging
from collections.abc import Callable

from symphony_hf.config import SymphonyConfig
from symphony_hf.patching.families.discovery import FoundRouter

from .training_checks import TrainingChecks

logger = logging.getLogger(__name__)

_READ_WITH: dict[str, tuple[Callable[[SymphonyConfig], bool], str]] = {
    "decay": (lambda config: config.counts_selections, "graph='ema'"),
    "bias_rate": (lambda config: config.balance == "bias", "balance='bias'"),
    "balance_scope": (
        lambda config: config.balance_loss_weight > 0,
        "balance='loss' and a balance_loss_weight above 0",
    ),
    "num_neighbours": (
        lambda config: config.router_gradient in ("neighbours", "random"),
        "router_gradient='neighbours' or 'random'",
    ),
}
"""For a setting that others may leave unread: whether it is read, and with what. A strength of 0 leaves none unread: a
baseline is the same run with it."""


def warn_of_no_effect(
    found: list[FoundRouter], settings: SymphonyConfig, checks: TrainingChecks, *, has_path: bool
) -> None:
    """Warn about a graph that stays the identity or becomes uniform, and about settings that nothing reads.

    Args:
        found: The routers.
        settings: The settings.
        checks: The checks of the model, which warn.
        has_path: Whether the graph is continued from a checkpoint's.
    """
    if settings.strength == 0 and settings.counts_selections:
        logger.warning("strength is 0: routing stays the base model's, and the graph is updated beside it")
    for message in (
        *_idle_graphs(settings, has_path),
        *_useless_choices(found, settings),
        *_unread_settings(settings),
    ):
        checks.warn_once(message)


def _idle_graphs(settings: SymphonyConfig, has_path: bool) -> list[str]:
    messages = []
    if settings.decay == 1 and settings.counts_selections and not has_path:
        messages.append(
            "decay=1 keeps every graph as it is, and it starts as the identity, which has no effect: decay=1 is for a "
            "checkpoint's graph, graph=PATH"
        )
    if settings.graph == "frozen":
        messages.append(
            "a frozen graph that was never learned is the identity, and has no effect: start from a checkpoint's graph "
            "with graph=PATH, decay=1 to keep it as it is"
        )
    if settings.graph == "learned" and settings.strength == 0:
        messages.append(
            "strength is 0, so a learned graph has no gradient, stays the identity and has no effect: use another "
            "strength, or graph='ema', which is updated beside the base model's routing"
        )
    if settings.balance == "bias" and settings.bias_rate == 0:
        messages.append(
            "bias_rate is 0, so balance='bias' leaves the correction bias as it is, and nothing balances the load: use "
            "a rate above 0, or balance='loss'"
        )
    return messages


def _useless_choices(found: list[FoundRouter], settings: SymphonyConfig) -> list[str]:
    if settings.strength == 0 or settings.decay == 1:
        return []
    contracts = [router.contract for router in found]
    if all(contract.top_k == 1 for contract in contracts):
        return [
            "this model chooses one expert per token, so no two are ever chosen together: the graph stays the identity "
            "and Symphony has no effect"
        ]
    names = [router.name for router in found if 1 < router.contract.num_experts == router.contract.top_k]
    if names and settings.counts_selections and settings.normalization != "centred":
        return [
            f"{len(names)} of {len(found)} routers (`{names[0]}`, ...) choose all of their experts for each token, so "
            "all pairs are chosen together alike: the graph becomes uniform, tells nothing of the experts, and takes "
            "the differences between logits. Use strength=0, or fewer experts per token"
        ]
    return []


def _unread_settings(settings: SymphonyConfig) -> list[str]:
    unread = [
        f"`{name}` ({value!r}) is read only with {needed}"
        for name, (is_read, needed) in _READ_WITH.items()
        if (value := getattr(settings, name)) != getattr(SymphonyConfig, name) and not is_read(settings)
    ]
    return [f"settings without effect: {'; '.join(unread)}. Leave them out, or set what reads them"] if unread else []
