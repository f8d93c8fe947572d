"""Prove, on random numbers, that a patched router computes what it should, before any router is patched."""

import copy

import torch
from torch import Tensor, nn

from .compat import supported_range
from .config import SymphonyConfig
from .errors import UnsupportedModelError
from .families import FoundRouter, RouterContract
from .graph import ExpertGraph
from .router import swap_class, symphony_router_class
from .routing import smooth_logits, smooth_probabilities

_NUM_TOKENS = 32


def check_routers(found: list[FoundRouter], config: SymphonyConfig) -> None:
    """Check one router of each class: bitwise the base's at the start, smoothed as the formula says after it.

    Raises:
        UnsupportedModelError: If the family's router does not compute what symphony_hf understands it to.
    """
    checked: set[tuple[type, RouterContract]] = set()
    for router in found:
        key = (type(router.module), router.contract)
        if key not in checked:
            checked.add(key)
            _check(router, config)


@torch.no_grad()
def _check(router: FoundRouter, config: SymphonyConfig) -> None:
    where = f"{type(router.module).__name__} `{router.name}`"
    trial, hidden_TD = _trial(router, config)
    base_class, contract = type(router.module), router.contract
    expected = base_class.forward(trial, hidden_TD)
    swap_class(trial, symphony_router_class(base_class))
    actual = type(trial).forward(trial, hidden_TD)
    if not all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)):
        raise UnsupportedModelError(
            f"{where}: with the identity for a graph the patched router differs from the original. {supported_range()}"
        )
    logits_TE = expected[contract.logits]
    if config.smoothing == "scores":
        _check_softmax_head(where, contract, expected)
    graph = trial.symphony
    assert isinstance(graph, ExpertGraph)
    _set_random_graph(graph)
    transition_EE = graph.transition()
    smoothed_TE = type(trial).forward(trial, hidden_TD)[contract.logits].float()
    if config.smoothing == "scores":
        wanted, got = smooth_probabilities(logits_TE.float().softmax(-1), transition_EE), smoothed_TE.softmax(-1)
    else:
        wanted, got = smooth_logits(logits_TE, transition_EE), smoothed_TE
    # Rounding alone: a few ulps of the router's type, on sums over the hidden size.
    tolerance = 32 * torch.finfo(logits_TE.dtype).eps * float(wanted.abs().max())
    if not float((wanted - got).abs().max()) <= tolerance:
        raise UnsupportedModelError(
            f"{where}: its recorded logits are not the smoothed ones, off by {(wanted - got).abs().max():.3g}: it does "
            f"not compute them from its `weight` alone. {supported_range()}"
        )


def _trial(router: FoundRouter, config: SymphonyConfig) -> tuple[nn.Module, Tensor]:
    """A copy of a router with random weights, so that none are needed: they may be on meta, or partitioned."""
    contract = router.contract
    trial = copy.copy(router.module)
    trial._parameters, trial._modules = dict(trial._parameters), dict(trial._modules)
    trial.__dict__.pop("_old_forward", None)
    weight: Tensor = router.module.weight  # type: ignore[assignment]
    device = "cpu" if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(contract.num_experts, contract.hidden_size, generator=generator) / contract.hidden_size**0.5
    hidden_TD = torch.randn(_NUM_TOKENS, contract.hidden_size, generator=generator)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    trial._parameters["weight"] = nn.Parameter(weight_ED.to(device, dtype), requires_grad=False)
    for name, parameter in trial._parameters.items():
        if name != "weight" and parameter is not None and parameter.shape == (contract.num_experts,):
            # A bias that is zero at first would not show where it enters.
            values_E = torch.randn(contract.num_experts, generator=generator)
            trial._parameters[name] = nn.Parameter(values_E.to(device, dtype), requires_grad=False)
    trial.symphony = ExpertGraph(contract.num_experts, contract.top_k, config, device)
    trial.contract = contract  # type: ignore[assignment]
    trial.training = False
    return trial, hidden_TD.to(device, dtype)


def _set_random_graph(graph: ExpertGraph) -> None:
    generator = torch.Generator().manual_seed(1)
    random_EE = torch.rand(graph.num_experts, graph.num_experts, generator=generator)
    graph.adjacency.copy_(random_EE + random_EE.T)
    graph.updates.fill_(graph.config.warmup_steps)


def _check_softmax_head(where: str, contract: RouterContract, outputs: tuple[Tensor, ...]) -> None:
    """Smoothing on scores is defined for routers whose weights are, up to one factor a token, softmax scores."""
    chosen_TK = outputs[contract.logits].float().softmax(-1).gather(1, outputs[contract.indices])
    ratio_TK = outputs[contract.weights].float() / chosen_TK
    if not torch.allclose(ratio_TK, ratio_TK[:, :1].expand_as(ratio_TK), rtol=0.05):
        raise UnsupportedModelError(
            f"{where}: its expert weights are no softmax of its logits, so smoothing `scores` is not defined for it; "
            "use smoothing=`logits`"
        )
