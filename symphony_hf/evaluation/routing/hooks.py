"""Hooks that read routers' selections from their outputs, by their contracts.

Recorded router logits are no substitute: in families that select with a bias or in groups, the highest logits are not
the selection, and many models do not record logits at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.probe import as_tuple
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.router import SymphonyRouter
from symphony_hf.patching.symphonize import all_routers


class WatchedRouter(NamedTuple):
    """A router and the contract for reading its output."""

    module: nn.Module
    contract: RouterContract


class Routed(NamedTuple):
    """The decisions of one call of a router.

    Attributes:
        logits_TE: Input logits of its head, smoothed if there is a graph, in the router's dtype.
        indices_TK: Distinct selected experts of each token, in any order.
    """

    logits_TE: Tensor
    indices_TK: Tensor


def routers_to_watch(model: nn.Module) -> dict[str, WatchedRouter]:
    """Return all routers of a model by module name, in module order.

    Args:
        model: A model that discovery supports, or a symphonized model with routers that its user named.

    Raises:
        UnsupportedModelError: If it has no router, or one of an unknown kind.
    """
    return {router.name: WatchedRouter(router.module, router.contract) for router in all_routers(model)}


@contextmanager
def watching_routers(model: nn.Module) -> Iterator[dict[str, list[Routed]]]:
    """Record the decisions of each router within this context.

    Args:
        model: Model, as in `routers_to_watch`.

    Yields:
        Decisions by router, one entry per call, including padding; a layer that runs twice in a forward pass has two
        entries. Callers empty the lists. The tensors stay on the model's device and keep their gradient.

    Raises:
        UnsupportedModelError: As `routers_to_watch`.
    """
    watches = {name: _Watch(router) for name, router in routers_to_watch(model).items()}
    try:
        yield {name: watch.seen for name, watch in watches.items()}
    finally:
        for watch in watches.values():
            watch.remove()


class RouterReader:
    """Reads the decisions of one router from its calls. `handles` are those of its hooks."""

    def __init__(self, router: WatchedRouter) -> None:
        self.router, self.contract = router
        self.handles: list[Any] = []
        self._logits: Tensor | None = None  # of the current call, if the router does not return them
        if self.contract.logits is not None:
            return
        if isinstance(self.router, SymphonyRouter):
            self.router.logit_notes = (*self.router.logit_notes, self._keep)
        elif self.contract.calls_linear:
            linear = linear_of(self.router, self.contract.linear)
            self.handles.append(linear.register_forward_hook(lambda module, args, output: self._keep(output)))

    def _keep(self, logits: Tensor) -> None:
        self._logits = logits

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Routed:
        """Return the decisions of a call from its arguments and output."""
        parts = as_tuple(output)
        logits = self._find_logits(parts, args, kwargs)
        logits_TE = logits.reshape(-1, logits.shape[-1])[:, : self.contract.num_experts]
        return Routed(logits_TE, self.contract.chosen_experts(parts, logits_TE))

    def _find_logits(self, parts: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.contract.logits is not None:
            return parts[self.contract.logits]
        if self._logits is not None:
            logits, self._logits = self._logits, None
            return logits
        hidden = args[0] if args else next(iter(kwargs.values()))
        weight: Any = linear_of(self.router, self.contract.linear).weight
        return F.linear(hidden.float(), weight.float())

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        if isinstance(self.router, SymphonyRouter):
            self.router.logit_notes = tuple(note for note in self.router.logit_notes if note != self._keep)
            if not self.router.logit_notes:
                self.router.__dict__.pop("logit_notes", None)


class _Watch(RouterReader):
    """Hooks that fill the list of one router."""

    def __init__(self, router: WatchedRouter) -> None:
        super().__init__(router)
        self.seen: list[Routed] = []
        self.handles.append(self.router.register_forward_hook(self._note, with_kwargs=True))

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.seen.append(self.read(args, kwargs, output))
