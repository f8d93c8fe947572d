"""Read a router's contract from what a twin of it returns."""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.errors import UnsupportedModelError
from symphony_hf.routing.gradient import ScoringFunc, Weighting

from .biases import check_outside_bias, correction_bias
from .contract import EXPERTS, RouterContract
from .entries import entry_of
from .probe import NUM_TOKENS, WRONG_INPUT, Probe
from .selection import HOW, BlockLook


def inspect_router(
    name: str, router: nn.Module, modules: dict[str, nn.Module], top_k: int | None = None
) -> RouterContract:
    """Run a twin of a router on random numbers and read its contract.

    Args:
        name: The router's module name, for error messages.
        router: The module.
        modules: The model's, by name: where a router returns logits alone, its block chooses.
        top_k: Experts chosen per token, where the user says so.

    Raises:
        UnsupportedModelError: If the module is no router, or one that cannot be patched.
    """
    if isinstance(getattr(router, "contract", None), RouterContract):
        return router.contract  # type: ignore[return-value]  # patched already, in a model nested in this one
    entry = entry_of(type(router))
    if refusal := entry.refusal(router):
        raise UnsupportedModelError(f"{type(router).__name__} `{name}`: {refusal}")
    # In float32, where a head's response to a shift of its logits is exact enough.
    reading = _Reading(Probe(name, router, torch.float32))
    probe, indices = reading.probe, reading.indices
    top_k = top_k or entry.top_k
    if top_k is not None and top_k > reading.num_experts:
        raise UnsupportedModelError(f"{probe.where}: it chooses {top_k} of {reading.num_experts} experts")
    block = BlockLook(probe.where, *_block_of(probe, name, modules)) if reading.is_logits_alone else None
    if block is not None and top_k is not None:
        block.check_top_k(top_k)
    elif block is not None:
        top_k = block.top_k()
    elif top_k is None or indices is not None or entry.choices is not None:
        top_k = reading.top_k(top_k, has_choices=entry.choices is not None)
    scoring_func, no_scoring_func = reading.scoring_func()
    weighting, no_weighting = reading.weighting(indices if entry.choices is None else None)
    if entry.no_weighting:
        weighting, no_weighting = None, entry.no_weighting
    if weighting is not None and not _has_experts(name, modules):
        weighting, no_weighting = None, f"no module `{EXPERTS}` beside it takes (hidden states, experts, weights)"
    parent = modules.get(name.rpartition(".")[0])
    bias, bias_in_block = correction_bias(probe, reading.indices, reading.carrier, reading.num_experts, parent)
    check_outside_bias(probe, reading.logits is not None, None if bias_in_block else bias)
    return RouterContract(
        num_experts=reading.num_experts,
        top_k=top_k,
        linear=probe.linear,
        calls_linear=probe.calls_linear,
        parameters=probe.parameters,
        logits=reading.logits,
        carrier=reading.carrier,
        indices=indices,
        choices=entry.choices,
        correction_bias=bias,
        bias_in_block=bias_in_block,
        scoring_func=scoring_func,
        no_scoring_func=no_scoring_func,
        weighting=weighting,
        no_weighting=no_weighting,
    )


def _block_of(probe: Probe, name: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """Return the module that calls a router, and the path of the router's linear map in it."""
    parent, _, own_name = name.rpartition(".")
    return modules[parent], f"{own_name}.{probe.linear}".strip(".")


def _has_experts(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module beside the router runs the experts that it is given for each token."""
    experts = modules[name.rpartition(".")[0]]._modules.get(EXPERTS)
    parameters = inspect.signature(type(experts).forward).parameters.values() if experts is not None else ()
    return sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters) > 3  # with `self`


class _Reading:
    """Positions of the parts of a router's output.

    Attributes:
        logits: Place of the logits; None where they are not in it.
        num_experts: Number of experts. Fewer than the linear map has rows, where not all of its rows compete.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.logits, self.num_experts = self._find_logits()

    def _find_logits(self) -> tuple[int | None, int]:
        probe = self.probe
        changed = []
        for place, output in enumerate(probe.outputs):
            if not _is_float(output) or output.dim() < 2 or output.numel() // output.shape[-1] != NUM_TOKENS:
                continue
            num_experts = output.shape[-1]
            flat = output.reshape(NUM_TOKENS, num_experts).float()
            if 1 < num_experts <= probe.rows and torch.equal(flat, probe.raw[:, :num_experts].float()):
                return place, num_experts
            if num_experts == probe.rows:
                changed.append(place)
        in_order = [place for place in changed if _keeps_order(probe.raw, probe.outputs[place])]
        for place in in_order:
            # All scaled or capped in the same way: still the logits, as the rest of the router sees them.
            if (probe.outputs[place].reshape(probe.raw.shape).sign() == probe.raw.sign()).all():
                return place, probe.rows
        scores = [place for place in changed if place in in_order or _is_distribution(probe.outputs[place])]
        if (probe.calls_linear or probe.multiplies_input) and changed == scores:
            return None, probe.rows
        raise UnsupportedModelError(
            f"{probe.where}: returns {self._shapes()}, among which logits of shape (tokens, {probe.rows}) were expected"
        )

    @cached_property
    def carrier(self) -> int:
        """Position of the tensor that experts use: weights of the chosen experts, of all experts, or the logits."""
        outputs = self.probe.outputs
        floats = [place for place, output in enumerate(outputs) if _is_float(output) and output.dim() > 0]
        others = [place for place in floats if place != self.logits]
        # A row with all experts may be logits or probabilities, returned for recording.
        weights = [place for place in others if outputs[place].shape[-1] != self.probe.rows]
        # Up to some release, Switch returned the highest probability twice in place of logits; its experts used the
        # second.
        return (weights or others or floats)[-1 if self.logits is None else 0]

    @property
    def is_logits_alone(self) -> bool:
        """Whether the router leaves the choice to its block."""
        return self.carrier == self.logits

    @cached_property
    def indices(self) -> int | None:
        """Position of the chosen experts: integers, one row per token. A row of all experts would be a mask."""
        found, outputs = [], self.probe.outputs
        for place, output in enumerate(outputs):
            if not isinstance(output, Tensor) or output.is_floating_point() or output.dtype == torch.bool:
                continue
            has_rows = output.dim() >= 2 and output.numel() == NUM_TOKENS * output.shape[-1]
            if has_rows and output.shape[-1] < self.num_experts:
                found.append(place)
        if len(found) > 1 or (found and not _are_choices(outputs[found[0]], self.num_experts)):
            raise UnsupportedModelError(
                f"{self.probe.where}: returns {self._shapes()}, among which it is not clear which integers say what "
                "experts were chosen"
            )
        return found[0] if found else None

    def top_k(self, wanted: int | None, has_choices: bool) -> int:
        """Return how many experts a token chooses. If they are not returned, they must be those of the highest logits.

        Args:
            wanted: The number that the user gives; None to take the router's own.
            has_choices: Whether they are read from the output in another way.
        """
        own = self._own_top_k(has_choices)
        if wanted not in (None, own):
            raise UnsupportedModelError(
                f"{self.probe.where}: it returns {own} chosen experts per token, got `top_k={wanted}`: leave it out"
            )
        return own

    def _own_top_k(self, has_choices: bool) -> int:
        probe = self.probe
        own = getattr(probe.router, "top_k", None)
        if self.indices is not None:
            num_returned = probe.outputs[self.indices].shape[-1]
            # Read in another way, because more are returned than are chosen.
            return min(num_returned, own) if has_choices and isinstance(own, int) else num_returned
        weights = probe.outputs[self.carrier]
        if isinstance(own, int) and (has_choices or torch.equal(weights != 0, _mask_of_highest(probe.raw, own))):
            return own
        raise UnsupportedModelError(
            f"{probe.where}: returns {self._shapes()}, among which no integers of shape (tokens, top_k) say which "
            f"experts were chosen; {HOW}"
        )

    def scoring_func(self) -> tuple[ScoringFunc | None, str]:
        """Return the scoring function, told from how weights change when all logits are shifted, or why none fits."""
        probe, outputs = self.probe, self.probe.outputs
        if self.num_experts != probe.rows:
            return None, "logits of shared experts go through the same head"
        if self.logits is not None and not torch.equal(outputs[self.logits].reshape(probe.raw.shape), probe.raw):
            return None, "its logits are changed after its linear map"
        if self.is_logits_alone:
            return None, "its block makes the weights"
        weights = outputs[self.carrier]
        try:
            same, shifted = (probe.finish(logits)[self.carrier] for logits in (probe.raw, probe.raw + 1.0))
        except WRONG_INPUT:
            same = shifted = None
        if same is None or not torch.allclose(same, weights):
            return None, "its head cannot be run on logits alone"
        if torch.allclose(shifted, weights, rtol=1e-2, atol=1e-3):
            return "softmax", ""
        scores = probe.raw.sigmoid()
        if self.indices is not None:
            scores = scores.gather(1, outputs[self.indices].reshape(NUM_TOKENS, -1).long())
        if _is_multiple(weights.reshape(NUM_TOKENS, -1), scores):
            return "sigmoid", ""
        return None, "its weights are neither a softmax nor a sigmoid of its logits"

    def weighting(self, indices: int | None) -> tuple[Weighting | None, str]:
        """Return how the chosen experts' weights are made from the logits in the output, or why that is not known.

        Args:
            indices: Position of the chosen experts; None where they are not returned, or not all of them are chosen.
        """
        probe, outputs = self.probe, self.probe.outputs
        if self.is_logits_alone:
            return None, "its block makes the weights"
        weights = outputs[self.carrier].reshape(NUM_TOKENS, -1).float()
        if indices is None or outputs[indices].numel() != weights.numel():
            return None, "it does not return the chosen experts with a weight for each"
        chosen = outputs[indices].reshape(NUM_TOKENS, -1).long()
        logits = (probe.raw if self.logits is None else outputs[self.logits]).reshape(NUM_TOKENS, -1).float()
        for scoring_func, score in _SCORING_FUNCS.items():
            scores = score(logits[:, : self.num_experts]).gather(1, chosen)
            totals, ratios = weights.sum(1), weights.sum(1) / scores.sum(1)
            if not torch.allclose(weights, scores * ratios[:, None], rtol=1e-3):
                continue
            if torch.allclose(totals, totals[0], rtol=1e-3):
                return Weighting(scoring_func, renormalized=True), ""
            if torch.allclose(ratios, ratios[0], rtol=1e-3):
                return Weighting(scoring_func, renormalized=False), ""
        return None, "its weights are neither a softmax nor a sigmoid of its logits, times a constant"

    def _shapes(self) -> str:
        outputs = self.probe.outputs
        return ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in outputs)


_SCORING_FUNCS: dict[ScoringFunc, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _keeps_order(raw: Tensor, changed: Tensor) -> bool:
    """Whether the same increasing function was applied to every logit."""
    in_order = changed.reshape(-1)[raw.reshape(-1).argsort()]
    return bool((in_order.diff() >= 0).all())


def _is_distribution(output: Tensor) -> bool:
    return bool((output >= 0).all() and ((output.sum(-1) - 1.0).abs() < 1e-4).all())


def _are_choices(indices: Tensor, num_experts: int) -> bool:
    """Whether every row has distinct numbers of experts."""
    in_order = indices.sort(-1).values
    return bool((in_order.diff(dim=-1) > 0).all() and in_order.min() >= 0 and in_order.max() < num_experts)


def _mask_of_highest(scores: Tensor, top_k: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(top_k).indices, True)


def _is_multiple(weights: Tensor, scores: Tensor) -> bool:
    """Whether weights are scores times one factor a token, where they are not 0."""
    if weights.shape != scores.shape:
        return False
    chosen = weights > 0
    ratio = torch.where(chosen, weights / scores, torch.nan)
    even = ratio.nanmean(1, keepdim=True).expand_as(ratio).where(chosen, torch.nan)
    return torch.allclose(ratio, even, rtol=0.05, equal_nan=True)
