"""A router's contract, read off its output: where the logits, the weights and the choices are."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_NUM_PROBE_TOKENS = 3


@dataclass(frozen=True)
class RouterContract:
    """How to read what a router's forward returns, a tuple of tensors.

    Attributes:
        num_experts: E.
        top_k: Experts chosen per token, K.
        hidden_size: D.
        logits: Place of the raw logits, (tokens, num_experts), before softmax.
        weights: Place of the chosen experts' weights, (tokens, top_k), which the experts multiply by.
        indices: Place of the chosen experts, (tokens, top_k), integer.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    logits: int
    weights: int
    indices: int


class MetaSelf:
    """Stands in for a router's `self` with every tensor on the meta device, so that its forward can be read freely.

    It needs no weights: it works while a checkpoint is loading, and on weights that ZeRO-3 has partitioned.
    """

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._router, name)
        if name == "weight":
            return torch.empty(router_weight_shape(self._router), dtype=value.dtype, device="meta")
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to("meta")
        return value.to("meta") if isinstance(value, Tensor) else value


def router_weight_shape(router: nn.Module) -> tuple[int, ...]:
    """The full shape of a router's weight, also where ZeRO-3 has partitioned it into an empty tensor."""
    return tuple(getattr(router.weight, "ds_shape", router.weight.shape))  # type: ignore[arg-type]


def inspect_router(name: str, router: nn.Module, logits_place: int) -> RouterContract:
    """Run a router's forward on meta tensors and read its contract.

    Args:
        name: The router's module name, for error messages.
        router: A module with a `weight` of shape (num_experts, hidden_size).
        logits_place: Where the model class says that its logits are.

    Raises:
        UnsupportedModelError: If the module is not such a router, or does not return logits, weights and choices.
    """
    if isinstance(getattr(router, "contract", None), RouterContract):
        return router.contract  # type: ignore[return-value]  # patched already, in a model nested in this one
    where = f"{type(router).__name__} `{name}`"
    if not isinstance(getattr(router, "weight", None), Tensor) or isinstance(router, nn.Linear):
        raise UnsupportedModelError(f"{where}: not a router that holds its own weight and selects its own experts")
    shape = router_weight_shape(router)
    if len(shape) != 2:
        raise UnsupportedModelError(f"{where}: its weight has shape {shape}, not (num_experts, hidden_size)")
    num_experts, hidden_size = shape
    outputs = _run_on_meta(where, router, hidden_size)
    if not isinstance(outputs, tuple) or not all(isinstance(output, Tensor) for output in outputs):
        raise UnsupportedModelError(f"{where}: returns {type(outputs).__name__}, not a tuple of tensors")
    indices = [i for i, output in enumerate(outputs) if not output.is_floating_point()]
    if len(indices) != 1 or outputs[logits_place].shape != (_NUM_PROBE_TOKENS, num_experts):
        raise UnsupportedModelError(
            f"{where}: returns tensors of shapes {[tuple(output.shape) for output in outputs]}, in which the logits "
            f"(tokens, {num_experts}) at place {logits_place} and one tensor of chosen experts were expected"
        )
    chosen = outputs[indices[0]]
    weights = [i for i, output in enumerate(outputs) if output.is_floating_point() and output.shape == chosen.shape]
    if chosen.dim() != 2 or weights[:1] in ([], [logits_place]):
        raise UnsupportedModelError(f"{where}: returns no weights of the chosen experts, shape {tuple(chosen.shape)}")
    return RouterContract(num_experts, chosen.shape[1], hidden_size, logits_place, weights[0], indices[0])


def _run_on_meta(where: str, router: nn.Module, hidden_size: int) -> Any:
    hidden_TD = torch.empty(_NUM_PROBE_TOKENS, hidden_size, dtype=router.weight.dtype, device="meta")  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            return type(router).forward(MetaSelf(router), hidden_TD)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{where}: its forward did not run on hidden states alone ({type(error).__name__}: {error})"
        ) from error
