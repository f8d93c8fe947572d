"""The top-k by which a router chooses its experts: seen, and replaced by given choices.

A family computes its gate weights from what its top-k returns, by its own scoring, normalization and scaling. With
other indices and the scores at these indices in its place, the same code computes the weights of other experts from the
current logits, with gradient. No family's code is copied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from symphony_hf.patching.families.discovery import FoundRouter
from symphony_hf.patching.families.probe import WRONG_INPUT, Probe
from symphony_hf.patching.router import ATTACHED, SymphonyRouter

_NOT_TOP_K = "it does not choose its experts by one top-k over their scores"


class SelectionTap(TorchFunctionMode):
    """Sees every top-k over the experts while it is entered, and replaces its outcome by given choices.

    Args:
        num_experts: Number of experts, E.
        given_TK: Choices to return; the router's own where negative, and everywhere when None. Shape: (tokens, top_k).

    Attributes:
        chosen_TK: Outcome of the last top-k over the experts, which is the choice; None before there was one.
    """

    def __init__(self, num_experts: int, given_TK: Tensor | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.given_TK = given_TK
        self.chosen_TK: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        return self._tap(func, *args, **kwargs)

    def _tap(self, func: Callable[..., Any], input: Tensor, k: int, dim: int = -1, **kwargs: Any) -> Any:
        outcome = func(input, k, dim, **kwargs)
        if dim not in (-1, input.dim() - 1):
            return outcome
        if input.shape[-1] == self.num_experts:
            return self._replace_choice(input, outcome)
        return self._widen_groups(func, input, k, outcome, **kwargs)

    def _replace_choice(self, scores: Tensor, outcome: Any) -> Any:
        indices, given_TK = outcome.indices, self.given_TK
        if given_TK is not None and given_TK.numel() == indices.numel():
            given = given_TK.to(indices.device).long().view_as(indices)
            indices = torch.where(given < 0, indices, given)
            outcome = torch.return_types.topk((scores.gather(-1, indices), indices))  # type: ignore[attr-defined]
        self.chosen_TK = indices.detach().reshape(-1, indices.shape[-1])
        return outcome

    def _widen_groups(self, func: Callable[..., Any], scores: Tensor, k: int, outcome: Any, **kwargs: Any) -> Any:
        """Let a preceding choice among groups of experts include the groups of the given choices.

        Experts of other groups would be masked, to a weight of 0 where weights are read after the mask.
        """
        num_groups, given_TK = scores.shape[-1], self.given_TK
        is_of_groups = num_groups < self.num_experts and self.num_experts % num_groups == 0
        if given_TK is None or not is_of_groups or scores.numel() != len(given_TK) * num_groups:
            return outcome
        given_TK = given_TK.to(scores.device).long()
        group_TK = given_TK.clamp_min(0) // (self.num_experts // num_groups)
        used_TG = scores.new_zeros(len(given_TK), num_groups).scatter_add(1, group_TK, (given_TK >= 0).to(scores)) > 0
        indices = func(scores.masked_fill(used_TG.view_as(scores), torch.inf), k, -1, **kwargs).indices
        return torch.return_types.topk((scores.gather(-1, indices), indices))  # type: ignore[attr-defined]


def tapped_module(router: FoundRouter, modules: dict[str, nn.Module]) -> nn.Module:
    """Return the module in whose forward a router's experts are chosen: the router, or its block."""
    contract = router.contract
    return modules[router.name.rpartition(".")[0]] if contract.block_chooses else router.module


def why_not_replayed(router: FoundRouter) -> str | None:
    """Return why a router's choices cannot be replayed; None if they can.

    A copy of the router runs on random numbers: its own choices, replayed, must give the same output bit for bit, and
    other choices must come out as they were given. A block that chooses has been checked, by running a copy of it, to
    do so by the highest logits of its gate.
    """
    if router.contract.image_tokens is not None:
        return "it gets a part of a sequence's tokens, of text or of images"
    if router.contract.block_chooses:
        return None
    try:
        return _problem_of(router)
    except WRONG_INPUT as error:
        return f"with replaced choices its forward fails ({type(error).__name__}: {error})"


def _problem_of(router: FoundRouter) -> str | None:
    contract = router.contract
    probe = Probe(router.name, _without_graph(router.module), torch.float32)
    tap, own = _run(probe, contract.num_experts, None)
    if tap.chosen_TK is None or tap.chosen_TK.shape[-1] != contract.top_k:
        return _NOT_TOP_K
    _, again = _run(probe, contract.num_experts, tap.chosen_TK)
    if not all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(own, again, strict=True)):
        return "replaying its own choices changes its output"
    given_TK = (tap.chosen_TK + 1) % contract.num_experts
    _, outputs = _run(probe, contract.num_experts, given_TK)
    if contract.indices is None and contract.choices is None:
        weights = outputs[contract.carrier].reshape(len(given_TK), -1)
        chosen_TK = weights.topk(contract.top_k).indices
    else:
        chosen_TK = contract.chosen_experts(outputs, probe.raw)
    if not torch.equal(chosen_TK.sort(-1).values, given_TK.sort(-1).values):
        return _NOT_TOP_K
    return None


def _run(probe: Probe, num_experts: int, given_TK: Tensor | None) -> tuple[SelectionTap, tuple[Any, ...]]:
    tap = SelectionTap(num_experts, given_TK)
    with tap:
        return tap, probe.run()


def _without_graph(router: Any) -> nn.Module:
    """Return a router of the family's own class that shares a Symphony router's tensors."""
    if not isinstance(router, SymphonyRouter):
        return router
    plain = router.base_class.__new__(router.base_class)
    plain.__dict__.update(router.__dict__)
    for name in (*ATTACHED, "forward", "_old_forward"):
        plain.__dict__.pop(name, None)
    children = {name: child for name, child in router.__dict__["_modules"].items() if name != "symphony"}
    plain.__dict__["_modules"] = children
    return plain
