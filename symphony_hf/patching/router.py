"""The Symphony router: a subclass of the family's own router, made for it on the spot.

The subclass changes nothing but the router's linear map while the family's own forward runs: its logits are smoothed,
or, by linearity, its weight is A @ W in place of W. No family's code is copied; the selection, the recorded logits and
the experts follow. An instance gets the subclass by `__class__` alone, so that `isinstance`, by which
transformers finds routers to record, still holds, and so that it goes back as simply.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symphony_hf.errors import PatchError
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.probe import as_tuple
from symphony_hf.patching.families.substitution import (
    DeferredWeight,
    LinearStandIn,
    OutputStandIn,
    StandIn,
    is_plain_linear,
    linear_of,
    stand_in_class,
    substitute,
    substitute_logits,
)
from symphony_hf.routing.graph import without_autocast
from symphony_hf.routing.losses import AttachLoss

from .counting import CoselectionCounter
from .expert_graph import active_graph
from .router_gradient import GradientOfOthers

ATTACHED = ("contract", "stack", "layer_index", "gradient_of_others")
"""Attributes that a router gets when it is patched and attached, beside its child `symphony`."""


class SymphonyRouter:
    """Mixin of the generated subclasses. What it declares is set when an instance is patched, and attached."""

    symphony: nn.Module
    contract: RouterContract
    stack: CoselectionCounter | None = None
    gradient_of_others: GradientOfOthers | None = None
    layer_index: int = 0
    base_class: type[nn.Module]
    stand_in: type[StandIn]
    logit_notes: tuple[Callable[[Tensor], None], ...] = ()  # of those who watch logits that are not returned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # whatever the family calls its hidden states
            args = (kwargs.pop(next(iter(kwargs))),)
        smooth_logits = active_graph(self.symphony).config.smoothing == "logits"
        forward = self._forward_with_logits_smoothed if smooth_logits else self._forward_with_scores_smoothed
        outputs, logits = forward(*args, **kwargs)
        stack = self.stack
        if stack is not None and not stack.owner.training:  # the stack's mode decides, not a layer's own
            stack = None
        if stack is None and not self.logit_notes:  # as in decoding, where a token's time counts
            return outputs
        logits_TE = logits()
        for note in self.logit_notes:
            note(logits_TE)
        return outputs if stack is None else self._observe(stack, outputs, logits_TE)

    def _observe(self, stack: CoselectionCounter, outputs: Any, logits_TE: Tensor) -> Any:
        """Record a training forward. Returns the outputs, with the router's losses attached."""
        contract, parts = self.contract, as_tuple(outputs)
        chosen_TK = contract.chosen_experts(parts, logits_TE)
        loss = stack.observe(self, logits_TE, chosen_TK)
        # On what the experts use: a recorded logit may lead to no loss at all.
        place = contract.carrier
        carrier = parts[place]
        stack.watch_outside(carrier)
        if self.gradient_of_others is not None and torch.is_grad_enabled() and logits_TE.requires_grad:
            carrier = self.gradient_of_others.extend(self, logits_TE, carrier, chosen_TK)
        if loss is not None:
            carrier = AttachLoss.apply(carrier, loss, stack.state.scale)
        return (*parts[:place], carrier, *parts[place + 1 :]) if isinstance(outputs, tuple) else carrier

    def _forward_with_logits_smoothed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Callable[[], Tensor]]:
        """Run the family's forward with its logits smoothed. Returns its output and a function that gives the logits.

        The logits' shape is (tokens, num_experts).
        """
        contract = self.contract
        linear = linear_of(self, contract.linear)  # type: ignore[arg-type]
        leaf: Any
        if contract.calls_linear and not is_plain_linear(linear):
            # LoRA, a quantized weight or a hook: more than a weight, so change what it returns.
            leaf = OutputStandIn(linear, self.smooth_logits)
        else:
            is_precise = _is_precise(hidden_states, linear.weight)  # type: ignore[arg-type]
            leaf = self._leaf(linear, self._defer if is_precise else self.apply_graph)
        outputs = self._run(leaf, hidden_states, *args, **kwargs)
        return outputs, lambda: self._logits(outputs, leaf, hidden_states)

    def _forward_with_scores_smoothed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Callable[[], Tensor]]:
        """Smooth the logits that the family's forward gives, then let its head finish with the smoothed ones.

        Its own softmax or sigmoid, selection and renormalization do the rest.
        """
        contract = self.contract
        linear = linear_of(self, contract.linear)  # type: ignore[arg-type]
        if contract.calls_linear:
            called = OutputStandIn(linear, lambda logits: self._smooth_scores(logits.flatten(0, -2)).view_as(logits))
            outputs = self._run(called, hidden_states, *args, **kwargs)
            return outputs, lambda: self._logits(outputs, called, hidden_states)
        leaf = self._leaf(linear, lambda tensor: tensor)
        plain = self._run(leaf, hidden_states, *args, **kwargs)
        smoothed_TE = self._smooth_scores(self._logits(plain, leaf, hidden_states))
        replaced, hidden_states = substitute_logits(
            self,  # type: ignore[arg-type]
            self.stand_in,
            contract.linear,
            contract.calls_linear,
            smoothed_TE,
            hidden_states,
            contract.parameters,
        )
        outputs = self.base_class.forward(replaced, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        return outputs, lambda: smoothed_TE

    def _smooth_scores(self, logits_TE: Tensor) -> Tensor:
        scoring_func = self.contract.scoring_func
        assert scoring_func is not None  # `symphonize` refuses scores of an unknown function
        return self.symphony(logits_TE, scoring_func)

    def _run(self, leaf: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the family's forward with `leaf` in place of its linear map."""
        replaced = substitute(self, self.stand_in, self.contract.linear, leaf)  # type: ignore[arg-type]
        return self.base_class.forward(replaced, hidden_states, *args, **kwargs)  # type: ignore[arg-type]

    def _logits(self, outputs: Any, leaf: Any, hidden_states: Tensor) -> Tensor:
        """Return the logits of a forward that has run with `leaf`. Shape: (tokens, num_experts)."""
        contract = self.contract
        if contract.logits is not None:
            logits = as_tuple(outputs)[contract.logits]
        elif contract.calls_linear:
            logits = leaf.output
        else:
            weight = leaf.weight if contract.linear else leaf["weight"]
            with without_autocast(hidden_states):
                logits = F.linear(hidden_states.float(), weight.float())
        return logits.reshape(-1, logits.shape[-1])

    def _leaf(self, linear: nn.Module, change: Callable[[Tensor], Any]) -> Any:
        """Return the replacement of the linear map: what its product is made of, changed along the experts."""
        changed = {name: change(getattr(linear, name)) for name in self.contract.parameters}
        if linear is self:
            return changed
        return LinearStandIn(linear, changed["weight"], changed.get("bias", getattr(linear, "bias", None)))

    def _defer(self, tensor: Tensor) -> DeferredWeight:
        return DeferredWeight(tensor, self.apply_graph, self.smooth_logits)

    def apply_graph(self, tensor: Tensor) -> Tensor:
        """Apply the graph along the experts of a weight or bias. Rows after them, of shared experts, stay."""
        num_experts = self.contract.num_experts
        if tensor.shape[0] == num_experts:
            return self.symphony(tensor)
        return torch.cat([self.symphony(tensor[:num_experts]), tensor[num_experts:]])

    def smooth_logits(self, logits: Tensor) -> Tensor:
        """Apply the graph to logits. Columns after the experts', of shared experts, stay. Shape: (..., rows)."""
        num_experts = self.contract.num_experts
        if logits.shape[-1] == num_experts:
            return self.symphony(logits, "logits")
        return torch.cat([self.symphony(logits[..., :num_experts], "logits"), logits[..., num_experts:]], dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.stack is not None:
            self.stack.tracker.place_scale()
        return self  # type: ignore[return-value]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Commit the last optimizer step if the loop did not, before the graph is read: of the model, or a part."""
        if self.stack is not None:
            self.stack.tracker.commit_alone()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the family's class: the subclass has no name that pickle could import."""
        return _new_router, (self.base_class,), self.__dict__


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def symphony_router_class(base_class: type[nn.Module]) -> type[nn.Module]:
    """Return the Symphony subclass of a family's router class. The same base gives the same class."""
    if base_class not in _CLASSES:
        _CLASSES[base_class] = _make_class(base_class)
    return _CLASSES[base_class]


def _make_class(base_class: type[nn.Module]) -> type[nn.Module]:
    name = f"Symphony{base_class.__name__}"
    # Kernels from the Hub would replace a forward by one that reads the weight itself, past the graph.
    namespace = {
        "base_class": base_class,
        "stand_in": stand_in_class(base_class),
        "kernel_layer_name": None,
        "__doc__": SymphonyRouter.__doc__,
    }
    return type(name, (SymphonyRouter, base_class), namespace)


def _is_precise(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether logits are smoothed after the product, (x W.T) A.T, and not by its weight, x (A W).T.

    The first costs next to nothing for few tokens, and differs from the second, which a folded checkpoint computes, by
    rounding: in float32 by 1e-6 of the largest logit. In 16 bits that would change the experts of 0.4% (8 experts) to
    5% (256) of tokens.
    """
    if min(hidden_states.dtype.itemsize, weight.dtype.itemsize) < 4 or weight.is_meta:
        return False
    # DeepSpeed puts a function in place of the built-in `linear`, which takes tensors alone.
    is_own = isinstance(F.linear, types.BuiltinFunctionType)
    return is_own and not torch.is_autocast_enabled(weight.device.type)


def _new_router(base_class: type[nn.Module]) -> nn.Module:
    router_class = symphony_router_class(base_class)
    return router_class.__new__(router_class)


def swap_class(router: nn.Module, router_class: type[nn.Module]) -> None:
    """Give a router another class, also below what keeps its old forward bound."""
    forward = types.MethodType(router_class.forward, router)
    for name in ("forward", "_old_forward"):  # accelerate's hooks keep it under the second, and give back the first
        if _is_own_forward(router, router.__dict__.get(name)):
            router.__dict__[name] = forward
    cell = _bound_forward(router)
    if cell is not None:
        cell.cell_contents = forward
    router.__class__ = router_class


def _is_own_forward(router: nn.Module, method: Any) -> bool:
    """Whether a method is the router's own class's forward, bound to the router."""
    return (
        isinstance(method, types.MethodType) and method.__self__ is router and method.__func__ is type(router).forward
    )


def check_swappable(name: str, router: nn.Module) -> None:
    """Refuse a router whose forward would still be its old class's after `swap_class`.

    Raises:
        PatchError: If its forward was replaced on the instance by something that does not show what it calls.
    """
    forward = router.__dict__.get("forward")
    is_hooked = _is_own_forward(router, router.__dict__.get("_old_forward"))
    if (
        forward is not None
        and not is_hooked
        and not _is_own_forward(router, forward)
        and _bound_forward(router) is None
    ):
        raise PatchError(
            f"symphonize: the forward of `{name}` was replaced by {router.__dict__['forward']!r}, which may go past "
            "the graph: symphonize before that is done"
        )


def _bound_forward(router: nn.Module) -> types.CellType | None:
    """Return the cell in which a wrapper keeps a router's forward (transformers 5.17's expert parallelism)."""
    for cell in getattr(router.__dict__.get("forward"), "__closure__", None) or ():
        if isinstance(cell.cell_contents, types.MethodType) and cell.cell_contents.__self__ is router:
            return cell
    return None
