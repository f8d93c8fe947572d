"""The Symphony router: a subclass of the family's own router, made for it on the spot.

The subclass changes nothing but what `self.weight` is while the family's own forward runs: A @ W in place of W. By
linearity that smooths the logits, exactly, without a copy of any family's code; the selection, the recorded logits
and the experts follow. An instance gets the subclass by `__class__` alone, so that `isinstance`, by which
transformers finds routers to record, still holds, and so that it goes back as simply.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .families import RouterContract
from .graph import active_graph
from .routing import AttachLoss
from .tracking import RouterStack


class SmoothedSelf:
    """Stands in for the router's `self` while its family's forward runs: every attribute but the given ones."""

    def __init__(self, router: nn.Module, replaced: dict[str, Any]) -> None:
        self._router = router
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        value = getattr(self._router, name)
        if isinstance(value, types.MethodType) and value.__self__ is self._router:
            # A helper of the family's forward must see the same weight.
            return types.MethodType(value.__func__, self)
        return value


class SymphonyRouter:
    """Mixin of the generated subclasses. What it declares is set when an instance is patched, and attached."""

    symphony: nn.Module
    contract: RouterContract
    stack: RouterStack | None = None
    place: int = 0
    base_class: type[nn.Module]
    training: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        smooth_logits = active_graph(self.symphony).config.smoothing == "logits"
        forward = self._forward_with_logits_smoothed if smooth_logits else self._forward_with_scores_smoothed
        outputs = forward(hidden_states, *args, **kwargs)
        if not self.training or self.stack is None:
            return outputs
        contract = self.contract
        loss = self.stack.observe(self, outputs[contract.logits], outputs[contract.indices])
        if loss is None:
            return outputs
        # On the weights, because the experts use them: a recorded logit may lead to no loss at all.
        place = contract.weights
        carrier = AttachLoss.apply(outputs[place], loss, self.stack.tracker.scale)
        return (*outputs[:place], carrier, *outputs[place + 1 :])

    def _forward_with_logits_smoothed(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        replaced = {"weight": self.symphony(self.weight)}  # type: ignore[attr-defined]
        bias = getattr(self, "bias", None)
        if isinstance(bias, Tensor):
            replaced["bias"] = self.symphony(bias)
        return self.base_class.forward(SmoothedSelf(self, replaced), *args, **kwargs)  # type: ignore[arg-type]

    def _forward_with_scores_smoothed(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Smooth what the family's forward gives, then let it finish with the smoothed logits as its input.

        With the identity for a weight its linear map changes nothing, and its own softmax, selection and
        renormalization do the rest.
        """
        contract = self.contract
        logits_TE = self.base_class.forward(self, hidden_states, *args, **kwargs)[contract.logits]  # type: ignore[arg-type]
        smoothed_TE = self.symphony(logits_TE)
        weight_EE = torch.eye(contract.num_experts, device=logits_TE.device).to(logits_TE.dtype)
        replaced: dict[str, Any] = {"weight": weight_EE}
        bias = getattr(self, "bias", None)
        if isinstance(bias, Tensor):
            replaced["bias"] = torch.zeros_like(bias)  # it is in the logits already
        for name in ("hidden_dim", "hidden_size"):
            if getattr(self, name, None) == contract.hidden_size:
                replaced[name] = contract.num_experts
        return self.base_class.forward(SmoothedSelf(self, replaced), smoothed_TE, *args, **kwargs)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.stack is not None:
            self.stack.tracker.place_scale()
        return self  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the family's class: the subclass has no name that pickle could import."""
        return _new_router, (self.base_class,), self.__dict__


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def symphony_router_class(base_class: type[nn.Module]) -> type[nn.Module]:
    """The Symphony subclass of a family's router class. The same class for the same base."""
    if base_class not in _CLASSES:
        _CLASSES[base_class] = _make_class(base_class)
    return _CLASSES[base_class]


def _make_class(base_class: type[nn.Module]) -> type[nn.Module]:
    name = f"Symphony{base_class.__name__}"
    # Kernels from the Hub would replace a forward by one that reads the weight itself, past the graph.
    namespace = {"base_class": base_class, "kernel_layer_name": None, "__doc__": SymphonyRouter.__doc__}
    return type(name, (SymphonyRouter, base_class), namespace)


def _new_router(base_class: type[nn.Module]) -> nn.Module:
    router_class = symphony_router_class(base_class)
    return router_class.__new__(router_class)


def swap_class(router: nn.Module, router_class: type[nn.Module]) -> None:
    """Give a router another class, also below the hooks of accelerate, which keep the old forward bound."""
    router.__class__ = router_class
    if "_old_forward" in router.__dict__:
        router.__dict__["_old_forward"] = types.MethodType(router_class.forward, router)
