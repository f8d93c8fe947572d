"""Run a router's own forward with something else in place of its linear map from hidden states to logits.

No family's code is copied: its forward is called with a stand-in for `self` that has every attribute of the router but
the linear map. The map is the router's own `weight`, or an `nn.Linear` inside it, which the forward calls or whose
`weight` it reads.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StandIn:
    """Stands in for a module's `self` while its class's forward runs: every attribute but the replaced ones.

    What the forward assigns to `self` goes to the module, but for the replaced ones, which stay the stand-in's.

    Args:
        module: The module itself.
        replaced: Attributes by name.
    """

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_replaced", replaced)
        # torch.compile reads it off an nn.Module without asking __getattr__, and would find the class's True.
        object.__setattr__(self, "training", module.training)

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        value = getattr(self._module, name)
        if isinstance(value, types.MethodType) and value.__self__ is self._module:
            # A helper of the family's forward must see the same replacements.
            return types.MethodType(value.__func__, self)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._replaced:
            self._replaced[name] = value
        else:
            setattr(self._module, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)  # type: ignore[arg-type]


def stand_in_class(base_class: type[nn.Module]) -> type[StandIn]:
    """Return the stand-in class for a router class. It inherits from one that has a router above it, for `super()`."""
    if base_class is nn.Linear or nn.Module in base_class.__bases__:
        return StandIn
    return type(f"{base_class.__name__}StandIn", (StandIn, base_class), {})


class Leaf:
    """Stands in for a linear map inside a router: it has every attribute of the map, and returns something else.

    Args:
        linear: The map.

    Attributes:
        output: What the last call returned; None before it.
    """

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear
        self.output: Tensor | None = None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        self.output = self.compute(hidden_states)
        return self.output

    def compute(self, hidden_states: Tensor) -> Tensor:
        """Compute the replacement of the map's output. Shape: (..., hidden_size) to (..., rows)."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> "Leaf":
        """As Switch and NLLB cast theirs in their forward; in place of it, since `output` is read afterwards."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._linear, name)


class DeferredWeight:
    """A map's weight or bias that is to be changed along its rows, where the change is cheaper on the product.

    `F.linear` multiplies by the stored numbers and changes what comes out. Every other operation gets the changed
    tensor, so a forward that does something else with it computes the same.

    Args:
        stored: The weight or bias. Shape: (rows, ...).
        change_rows: Changes a tensor along its first dimension.
        change_product: Makes the same change along the last dimension. Shape: (..., rows), in and out.
    """

    def __init__(
        self, stored: Tensor, change_rows: Callable[[Tensor], Tensor], change_product: Callable[[Tensor], Tensor]
    ) -> None:
        self._stored = stored
        self._change_rows = change_rows
        self._change_product = change_product

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and isinstance(args[1], cls):
            stored = [argument._stored if isinstance(argument, cls) else argument for argument in args[1:]]
            return args[1]._change_product(func(args[0], *stored))
        changed = [argument.changed() if isinstance(argument, cls) else argument for argument in args]
        named = {name: value.changed() if isinstance(value, cls) else value for name, value in (kwargs or {}).items()}
        return func(*changed, **named)

    def changed(self) -> Tensor:
        """Compute the changed tensor."""
        return self._change_rows(self._stored)

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype

    def to(self, dtype: torch.dtype) -> Any:
        return self if dtype == self.dtype else self.changed().to(dtype)

    type = to

    def float(self) -> Any:
        return self.to(torch.float32)

    def __getitem__(self, index: Any) -> Tensor:
        return self.changed()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.changed(), name)


class LinearStandIn(Leaf):
    """The map with another weight and bias."""

    def __init__(self, linear: nn.Module, weight: Any, bias: Any) -> None:
        super().__init__(linear)
        self.weight = weight
        self.bias = bias

    def compute(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> "LinearStandIn":
        self.weight = self.weight.to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)
        return self


class OutputStandIn(Leaf):
    """A map that is more than its weight (LoRA, 4-bit, hooks), called as it is: what it returns is changed.

    Args:
        linear: The map.
        change: Applied to its output. Shape: (..., rows), in and out.
    """

    def __init__(self, linear: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(linear)
        self._change = change

    def compute(self, hidden_states: Tensor) -> Tensor:
        return self._change(self._linear(hidden_states))


class GivenLogits(Leaf):
    """A map that returns the given logits, whatever comes in."""

    def __init__(self, linear: nn.Module, logits: Tensor) -> None:
        super().__init__(linear)
        self._logits = logits

    def compute(self, hidden_states: Tensor) -> Tensor:
        return self._logits.view(*hidden_states.shape[:-1], -1)


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether calling a linear map is multiplying by its weight and nothing else."""
    return type(linear) is nn.Linear and not (
        "forward" in linear.__dict__ or linear._forward_hooks or linear._forward_pre_hooks
    )


def substitute(router: nn.Module, stand_in: type[StandIn], path: str, leaf: "dict[str, Any] | Leaf") -> StandIn:
    """Return a stand-in for a router, with `leaf` in place of its linear map.

    Args:
        router: Router of any family.
        stand_in: Stand-in class of the router's class, from `stand_in_class`.
        path: Path of the linear map inside it, such as `router_mlp.out_proj`; empty for the router itself.
        leaf: What takes its place; for an empty path its weight and bias by name.
    """
    if isinstance(leaf, dict):
        return stand_in(router, leaf)
    *parents, name = path.split(".")
    replaced: dict[str, Any] = {name: leaf}
    for depth in range(len(parents), 0, -1):
        inner = StandIn(router.get_submodule(".".join(parents[:depth])), replaced)
        replaced = {parents[depth - 1]: inner}
    return stand_in(router, replaced)


def linear_of(router: nn.Module, path: str) -> nn.Module:
    """Return the module that holds a router's weight: one inside it, or itself if the path is empty."""
    return router.get_submodule(path) if path else router


def substitute_logits(
    router: nn.Module,
    stand_in: type[StandIn],
    path: str,
    calls_linear: bool,
    logits: Tensor,
    hidden_states: Tensor,
    parameters: tuple[str, ...] = ("weight", "bias"),
) -> tuple[StandIn, Tensor]:
    """Return a stand-in and an input with which a router computes its head alone, from given logits.

    Args:
        router: Router of any family.
        stand_in: Stand-in class of the router's class.
        path: Path of its linear map.
        calls_linear: Whether its forward calls the map; otherwise it multiplies by the weight itself.
        logits: Shape: (tokens, rows of the map).
        hidden_states: The router's real input. Shape: (..., hidden_size).
        parameters: Names of the map's parameters that are in the logits already.

    Returns:
        The stand-in, and the hidden states to call it with.
    """
    linear = linear_of(router, path)
    if calls_linear:
        return substitute(router, stand_in, path, GivenLogits(linear, logits)), hidden_states
    # Multiplying by the identity leaves the given logits as they are.
    rows = logits.shape[-1]
    weight = torch.eye(rows, device=logits.device).to(logits.dtype)
    bias = getattr(linear, "bias", None)
    if isinstance(bias, Tensor) and "bias" in parameters:
        bias = torch.zeros_like(bias)
    leaf: Any = LinearStandIn(linear, weight, bias) if path else {"weight": weight, "bias": bias}
    replaced = substitute(router, stand_in, path, leaf)
    for name in ("hidden_dim", "hidden_size", "input_size"):
        if getattr(router, name, None) == hidden_states.shape[-1]:
            replaced._replaced[name] = rows
    return replaced, logits.view(*hidden_states.shape[:-1], rows)
