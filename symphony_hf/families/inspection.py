"""Read a router's contract by running a twin of it on random numbers."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from .contract import Head, RouterContract
from .entries import entry_of
from .selection import BlockRun
from .substitution import linear_of, stand_in_class, substitute_logits
from .twin import full_shape, normal, random_like, same_draws, twin, uniform

_NUM_TOKENS = 24
_EXPECTED = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError)
"""What a forward raises when it is not given what it wants. Others are its own bugs, and not hidden."""


class LinearSpy(TorchFunctionMode):
    """Notes what linear maps with a number of rows return while it is entered.

    Args:
        rows: The number.

    Attributes:
        outputs: In the order of the calls. Shape of each: (..., rows).
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and output.shape[-1] == self.rows:
            self.outputs.append(output.clone())  # forwards change it in place
        return output


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """What a router returned, as a tuple: some return their logits alone."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Probe:
    """One router's twin, its input, and what it returns.

    Args:
        name: The router's module name, for error messages.
        router: It stays as it is.
        dtype: Of its weights; the router's own when None.

    Attributes:
        raw: What the linear map returned. Shape: (tokens, rows).
        outputs: What the router returned, as a tuple.

    Raises:
        UnsupportedModelError: If there is no linear map in it, or its forward does not run.
    """

    def __init__(self, name: str, router: nn.Module, dtype: torch.dtype | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.where = f"{type(router).__name__} `{name}`"
        self.base_class = type(router)
        self.router = twin(router, random_like(generator, dtype))
        self.linear = _linear_path(self.where, router)
        weight: Any = linear_of(self.router, self.linear).weight
        self.rows, inputs = weight.shape
        self.hidden_size = _hidden_size(router, self.linear, inputs)
        self.hidden_TD = normal((_NUM_TOKENS, self.hidden_size), generator).to(weight.dtype)
        self.arguments = _probe_arguments(self.base_class, self.rows, generator)
        self._run()

    def _run(self) -> None:
        errors = []
        for hidden in (self.hidden_TD, self.hidden_TD[None]):  # some take (batch, length, hidden_size) alone
            calls: list[Any] = []
            handle = linear_of(self.router, self.linear).register_forward_hook(lambda *call: calls.append(call))  # noqa: B023
            try:
                with same_draws(), LinearSpy(self.rows) as spy:
                    outputs = self.base_class.forward(self.router, hidden.clone(), **self.arguments)
            except _EXPECTED as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            finally:
                handle.remove()
            if not spy.outputs:
                raise UnsupportedModelError(f"{self.where}: its forward does not multiply by its weight")
            self.hidden, self.raw = hidden, spy.outputs[-1].reshape(-1, self.rows)
            self.outputs = as_tuple(outputs)
            self.calls_linear = bool(self.linear and calls)
            weight: Any = linear_of(self.router, self.linear).weight
            product = torch.nn.functional.linear(self.hidden_TD.float(), weight.float())
            self.multiplies_input = torch.equal(product, self.raw.float())
            return
        raise UnsupportedModelError(
            f"{self.where}: its forward did not run on hidden states of shape (tokens, {self.hidden_size}) or (1, "
            f"tokens, {self.hidden_size}): {' | '.join(errors)}"
        )

    def finish(self, logits: Tensor) -> tuple[Any, ...]:
        """What the router's head alone makes of given logits."""
        stand_in = stand_in_class(self.base_class)
        args = (self.router, stand_in, self.linear, self.calls_linear, logits, self.hidden.clone())
        replaced, hidden = substitute_logits(*args)
        with same_draws():
            outputs = self.base_class.forward(replaced, hidden, **self.arguments)  # type: ignore[arg-type]
        return as_tuple(outputs)


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
    if entry.refusal:
        raise UnsupportedModelError(f"{type(router).__name__} `{name}`: {entry.refusal}")
    probe = Probe(name, router, torch.float32)  # a head answers to a shift of its logits exactly enough
    logits_place, num_experts = _find_logits(probe)
    top_k = top_k or entry.top_k
    indices_place = None
    carrier = _find_carrier(probe, logits_place)
    if top_k is None:
        indices_place = _find_indices(probe, num_experts)
        top_k = _find_top_k(probe, logits_place, indices_place, carrier, modules, name)
    elif carrier == logits_place and name:
        _block_run(probe, modules, name).check_gate_is_called()
    if not 1 <= top_k <= num_experts:
        raise UnsupportedModelError(f"{probe.where}: it chooses {top_k} of {num_experts} experts")
    head, no_head = _find_head(probe, logits_place, num_experts, indices_place, carrier)
    return RouterContract(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=probe.hidden_size,
        linear=probe.linear,
        calls_linear=probe.calls_linear,
        logits=logits_place,
        carrier=carrier,
        indices=indices_place,
        choices=entry.choices,
        head=head,
        no_head=no_head,
    )


def _linear_path(where: str, router: nn.Module) -> str:
    """Where the linear map to the logits is: the router's own weight, or the last nn.Linear in it."""
    own = router._parameters.get("weight")
    if own is not None:
        if len(full_shape(own)) != 2 or not own.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{where}: its weight is {own.dtype} of shape {full_shape(own)}, not floating-point of shape "
                "(num_experts, hidden_size): keep routers out of the quantization"
            )
        return ""
    linears = [path for path, module in router.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UnsupportedModelError(f"{where}: neither a weight of its own nor an nn.Linear in it")
    return linears[-1]


def _hidden_size(router: nn.Module, path: str, linear_inputs: int) -> int:
    """The width of the router's input. In a router of several layers it is not the last one's."""
    own = getattr(router, "hidden_size", None)
    return own if isinstance(own, int) and "." in path else linear_inputs


def _probe_arguments(router_class: type[nn.Module], rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a router's forward takes beside hidden states: the bias that some add to their scores to choose."""
    names = list(inspect.signature(router_class.forward).parameters)[2:]
    return {name: uniform((rows,), generator) for name in names if name.endswith("bias")}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _find_logits(probe: Probe) -> tuple[int | None, int]:
    """Place of the logits and their number. Some return fewer than the linear map has rows: not all compete."""
    changed: list[tuple[int, int]] = []
    for place, output in enumerate(probe.outputs):
        if not _is_float(output) or output.dim() < 2 or output.numel() // output.shape[-1] != _NUM_TOKENS:
            continue
        num_experts = output.shape[-1]
        flat = output.reshape(_NUM_TOKENS, num_experts)
        if 1 < num_experts <= probe.rows and torch.equal(flat.float(), probe.raw[:, :num_experts].float()):
            return place, num_experts
        if num_experts == probe.rows:
            changed.append((place, num_experts))
    if probe.calls_linear:
        return None, probe.rows
    if changed:
        return changed[0]
    if probe.multiplies_input:
        return None, probe.rows
    raise UnsupportedModelError(
        f"{probe.where}: returns {_describe(probe.outputs)}, among which logits of shape (tokens, {probe.rows}) were "
        "expected"
    )


def _describe(outputs: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in outputs)


def _find_indices(probe: Probe, num_experts: int) -> int | None:
    """Place of the chosen experts: integers, a row a token. As many as there are experts would be a mask of them."""
    for place, output in enumerate(probe.outputs):
        if not isinstance(output, Tensor) or output.is_floating_point() or output.dtype == torch.bool:
            continue
        if output.dim() >= 2 and output.numel() == _NUM_TOKENS * output.shape[-1] and output.shape[-1] < num_experts:
            return place
    return None


def _find_carrier(probe: Probe, logits_place: int | None) -> int:
    """Place of what the experts use: the weights of the chosen ones, or of all, or the logits themselves."""
    floats = [place for place, output in enumerate(probe.outputs) if _is_float(output) and output.dim() > 0]
    others = [place for place in floats if place != logits_place]
    # A row of all experts may be logits or probabilities, returned to be recorded.
    weights = [place for place in others if probe.outputs[place].shape[-1] != probe.rows]
    # Switch returned each token's highest probability twice before it returned its logits, and used the second.
    return (weights or others or floats)[-1 if logits_place is None else 0]


def _find_top_k(
    probe: Probe,
    logits_place: int | None,
    indices_place: int | None,
    carrier: int,
    modules: dict[str, nn.Module],
    name: str,
) -> int:
    """How many experts a token chooses; where they are not returned, only if they are the highest logits for sure."""
    own = getattr(probe.router, "top_k", None)
    if indices_place is not None:
        return probe.outputs[indices_place].shape[-1]
    if entry_of(probe.base_class).choices is not None:
        return own  # type: ignore[return-value]
    if carrier == logits_place:
        return _block_run(probe, modules, name).top_k()
    weights = probe.outputs[carrier]
    if isinstance(own, int) and weights.shape == probe.raw.shape:
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(1, probe.raw.topk(own).indices, True)
        if torch.equal(weights != 0, chosen):
            return own
    raise UnsupportedModelError(
        f"{probe.where}: returns {_describe(probe.outputs)}, among which no integers of shape (tokens, top_k) say "
        "which experts were chosen"
    )


def _block_run(probe: Probe, modules: dict[str, nn.Module], name: str) -> BlockRun:
    parent = name.rpartition(".")[0]
    path = f"{name[len(parent) :].lstrip('.')}.{probe.linear}".rstrip(".")
    return BlockRun(probe.where, modules[parent], path)


def _find_head(
    probe: Probe, logits_place: int | None, num_experts: int, indices_place: int | None, carrier: int
) -> tuple[Head | None, str]:
    """What makes weights of logits, by how they answer to a shift of all logits."""
    if num_experts != probe.rows:
        return None, "logits of shared experts go through the same head"
    if logits_place is not None and not torch.equal(
        probe.outputs[logits_place].reshape(probe.raw.shape).float(), probe.raw.float()
    ):
        return None, "its logits are changed after its linear map"
    if carrier == logits_place:
        return None, "its block makes the weights"
    weights = probe.outputs[carrier].float()
    if not torch.allclose(probe.finish(probe.raw)[carrier].float(), weights):
        return None, "its head cannot be run on logits alone"
    if torch.allclose(probe.finish(probe.raw + 1.0)[carrier].float(), weights, rtol=1e-2, atol=1e-3):
        return "softmax", ""
    scores = probe.raw.float().sigmoid()
    if indices_place is not None:
        scores = scores.gather(1, probe.outputs[indices_place].reshape(_NUM_TOKENS, -1).long())
    weights = weights.reshape(_NUM_TOKENS, -1)
    if weights.shape == scores.shape:
        chosen = weights > 0
        ratio = torch.where(chosen, weights / scores, torch.nan)
        even = ratio.nanmean(1, keepdim=True).expand_as(ratio).where(chosen, torch.nan)
        if torch.allclose(ratio, even, rtol=0.05, equal_nan=True):
            return "sigmoid", ""
    return None, "its weights are neither a softmax nor a sigmoid of its logits"
