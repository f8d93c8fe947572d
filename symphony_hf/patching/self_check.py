"""Prove, on random numbers, that a patched router computes what it should, before any router is patched."""

from typing import Any

import torch
from torch import Tensor

from symphony_hf.compat import supported_range
from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import UnsupportedModelError
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.discovery import FoundRouter
from symphony_hf.patching.families.probe import WRONG_INPUT, LinearSpy, Probe, as_tuple, same_draws
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.routing.smoothing import smooth_logits, smooth_probabilities

from .expert_graph import ExpertGraph
from .router import swap_class, symphony_router_class


def check_routers(found: list[FoundRouter], config: SymphonyConfig) -> None:
    """Check one router of each kind: bitwise the base's at the start, smoothed as the formula says after it.

    Raises:
        UnsupportedModelError: If the family's router does not compute what symphony_hf understands it to.
    """
    checked: set[tuple[type, RouterContract]] = set()
    for router in found:
        kind = (type(router.module), router.contract)
        if kind in checked:
            continue
        checked.add(kind)
        try:
            _check(router, config)
        except WRONG_INPUT as error:
            raise UnsupportedModelError(
                f"{type(router.module).__name__} `{router.name}`: patched, its forward fails where the original's does "
                f"not ({type(error).__name__}: {error})"
            ) from error


def _check(router: FoundRouter, config: SymphonyConfig) -> None:
    if config.smoothing == "scores":
        _refuse_without_head(router)
    for training in (False, True):
        _Check(router, config, training=training).check_start()
    # Coarse types make ties, which two ways to the same scores break differently.
    precise = torch.float32 if config.smoothing == "scores" else None
    _Check(router, config, precise).check_with_graph()


def _refuse_without_head(router: FoundRouter) -> None:
    if router.contract.scoring_func is None:
        raise UnsupportedModelError(
            f"{type(router.module).__name__} `{router.name}`: smoothing `scores` is not defined for it: "
            f"{router.contract.no_scoring_func}; use smoothing=`logits`"
        )


class _Check:
    """One router's twin, patched, beside what the family's own class computes."""

    def __init__(
        self, router: FoundRouter, config: SymphonyConfig, dtype: torch.dtype | None = None, training: bool = False
    ) -> None:
        self.contract, self.config = router.contract, config
        self.probe = Probe(router.name, router.module, dtype, training)
        self.trial: Any = self.probe.router
        self.graph = ExpertGraph(self.contract.num_experts, self.contract.top_k, config, "cpu")
        self.trial.symphony = self.graph
        self.trial.__dict__["contract"] = self.contract
        swap_class(self.trial, symphony_router_class(self.probe.base_class))

    def check_start(self) -> None:
        """Check that with the identity as graph it equals the original bit for bit."""
        if not _same(self.probe.outputs, self._forward(self.trial)):
            mode = "training" if self.trial.training else "evaluation"
            self._refuse(f"with the identity for a graph the patched router differs from the original, in {mode}")

    @torch.no_grad()
    def check_with_graph(self) -> None:
        """Check that with any graph it computes the formula, from the linear map's output alone."""
        _set_random_graph(self.graph)
        if self.config.smoothing == "scores":
            self._check_scores()
        else:
            self._check_logits()
            self._check_fold()
        if self.contract.calls_linear:
            self._check_map_decides()

    def _check_map_decides(self) -> None:
        """Check that no second map, such as one for noise, takes part: it would not be smoothed."""
        probe = self.probe
        swap_class(self.trial, probe.base_class)
        here, elsewhere = (probe.finish(probe.raw, hidden) for hidden in (probe.hidden, probe.hidden.flip(-2) * 0.5))
        for one, other in zip(here, elsewhere, strict=True):
            states = isinstance(one, Tensor) and one.shape[:-1] == probe.hidden.shape[:-1] and one.dim() == 3
            if not states and not _same((one,), (other,)):  # what a router hands on to the next layer's is no choice
                self._refuse(f"more than its linear map `{self.contract.linear}` decides what it returns")

    def _forward(self, router: Any) -> tuple[Any, ...]:
        with same_draws():
            return as_tuple(type(router).forward(router, self.probe.hidden.clone(), **self.probe.arguments))

    def _check_logits(self) -> None:
        num_experts = self.contract.num_experts
        got = self._trial_logits()
        wanted = smooth_logits(self.probe.raw[:, :num_experts], self.graph.transition())
        wanted = torch.cat([wanted, self.probe.raw[:, num_experts:].float()], dim=1)
        self._compare("its logits are not the smoothed ones", wanted, got)

    def _trial_logits(self) -> Tensor:
        with LinearSpy(self.probe.rows) as spy:
            self._forward(self.trial)
        return spy.outputs[-1].reshape(self.probe.raw.shape)

    def _check_fold(self) -> None:
        """Check that a plain router with A W for its weight has the patched one's logits: in 16 bits bit for bit."""
        smoothed = self._trial_logits()
        linear: Any = linear_of(self.trial, self.contract.linear)
        for name in self.contract.parameters:
            parameter = linear._parameters[name]
            parameter.copy_(self.trial.apply_graph(parameter))
        swap_class(self.trial, self.probe.base_class)
        folded = self._trial_logits()
        if linear.weight.dtype.itemsize < 4 and not torch.equal(smoothed, folded):
            self._refuse("folded, it differs from the patched router")
        self._compare("folded, it differs from the patched router", smoothed, folded)

    def _check_scores(self) -> None:
        raw, transition_EE = self.probe.raw.float(), self.graph.transition()
        if self.contract.scoring_func == "sigmoid":
            logits = (raw.sigmoid() @ transition_EE.T).logit()
        else:
            logits = smooth_probabilities(raw.softmax(-1), transition_EE).log()
        place = self.contract.carrier
        wanted = self.probe.finish(logits.to(self.probe.raw.dtype))[place]
        self._compare("its weights are not those of the mixed scores", wanted, self._forward(self.trial)[place])

    def _compare(self, complaint: str, wanted: Tensor, got: Tensor) -> None:
        # Rounding alone: a few ulps of the weight's type, to which A W is rounded, on sums over the hidden size; or of
        # float32, in which the graph is. The mean over many experts is smaller than what it is of.
        weight: Any = linear_of(self.trial, self.contract.linear).weight
        eps = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        tolerance = 32 * eps * float(max(wanted.abs().max(), self.probe.raw.abs().max()))
        off = float((wanted.float() - got.float()).abs().max())
        if not off <= tolerance:
            self._refuse(f"{complaint}, off by {off:.3g}")

    def _refuse(self, complaint: str) -> None:
        own = self.probe.base_class.__module__.startswith("transformers.")
        remedy = supported_range() if own else "symphony_hf smooths routers that are linear in one weight"
        raise UnsupportedModelError(f"{self.probe.where}: {complaint}. {remedy}")


def _same(expected: tuple[Any, ...], actual: tuple[Any, ...]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(expected, actual, strict=True))


@torch.no_grad()
def _set_random_graph(graph: ExpertGraph) -> None:
    generator = torch.Generator().manual_seed(1)
    random_EE = torch.rand(graph.num_experts, graph.num_experts, generator=generator)
    graph.adjacency.copy_(random_EE + random_EE.T)
    graph.updates.fill_(graph.config.warmup_steps)
