"""Settings of `router_gradient` that a model cannot have, refused before anything is changed."""

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import ConfigError, UnsupportedModelError
from symphony_hf.patching.families.discovery import FoundRouter


def check_router_gradient(found: list[FoundRouter], settings: SymphonyConfig) -> None:
    """Refuse a `router_gradient` that a router's family does not support, or that needs more experts than there are.

    Raises:
        UnsupportedModelError: If it is not known how a router makes its weights, or its experts cannot be run alone.
        ConfigError: If a token chooses all experts, or `num_neighbours` is more than those that it does not choose.
    """
    if settings.router_gradient == "chosen":
        return
    for router in found:
        contract = router.contract
        num_others = contract.num_experts - contract.top_k
        if num_others == 0:
            raise ConfigError(
                f"symphony: router_gradient={settings.router_gradient!r} has nothing to add: a token chooses all "
                f"{contract.num_experts} experts of `{router.name}`; use router_gradient='chosen'"
            )
        if contract.weighting is None:
            raise UnsupportedModelError(
                f"{type(router.module).__name__} `{router.name}`: router_gradient={settings.router_gradient!r} is not "
                f"defined for it: {contract.no_weighting}; use router_gradient='chosen'"
            )
        if settings.router_gradient != "dense" and settings.num_neighbours > num_others:
            raise ConfigError(
                f"symphony: `num_neighbours` is {settings.num_neighbours}, but `{router.name}` has "
                f"{contract.num_experts} experts, of which a token chooses {contract.top_k}: at most {num_others}"
            )


def check_graph_of_neighbours(found: list[FoundRouter], settings: SymphonyConfig, has_path: bool) -> None:
    """Refuse `neighbours` where the graph stays the identity, in which no expert has a neighbour.

    Args:
        found: The routers.
        settings: The settings.
        has_path: Whether the graph is continued from a checkpoint's.

    Raises:
        ConfigError: If the graph stays the identity.
    """
    if settings.router_gradient != "neighbours":
        return
    is_fixed = settings.graph == "frozen" or (settings.graph == "ema" and settings.decay == 1)
    reason = "it starts as the identity and is never learned: start from a checkpoint's with graph=PATH"
    if all(router.contract.top_k == 1 for router in found):
        is_fixed, reason = True, "a token chooses one expert, so no two are chosen together"
    elif has_path:
        return
    if is_fixed:
        raise ConfigError(
            f"symphony: router_gradient='neighbours' needs a graph, and here no expert has a neighbour: {reason}"
        )
