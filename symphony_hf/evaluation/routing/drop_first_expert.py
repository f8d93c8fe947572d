"""Run a model without each token's first expert."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.errors import UnsupportedModelError
from symphony_hf.patching.families.probe import as_tuple, full_shape
from symphony_hf.patching.families.substitution import linear_of, stand_in_class, substitute_logits
from symphony_hf.patching.router import SymphonyRouter

from .hooks import RouterReader, WatchedRouter, routers_to_watch

_NEVER = -1e4
"""A logit or selection bias that excludes an expert, within the range of float16."""


@contextmanager
def first_expert_dropped(model: nn.Module) -> Iterator[None]:
    """Drop each token's first expert while this context is active; the next one takes its place.

    The first expert is the selected one with the highest logit, and so the largest weight. Its logit is set to a very
    low value, and so is its selection bias, if there is one. Then the router's own head selects and weights again. This
    happens in all layers at once, so later layers route the changed hidden states. The model must be in eval mode.

    Raises:
        UnsupportedModelError: On entry or in the first forward pass, if a router's head cannot run on logits alone; in
            any forward pass, if it selects a token's first expert again.

    Source: Dai et al., "DeepSeekMoE" (arXiv 2401.06066), section 4.5, which masks a share of the top routed experts and
    selects from the remaining ones.
    """
    droppers: list[_Dropper] = []
    try:
        for name, router in routers_to_watch(model).items():
            droppers.append(_Dropper(name, router))
        yield
    finally:
        for dropper in droppers:
            dropper.remove()


class _Dropper(RouterReader):
    """Replaces the output of one router."""

    def __init__(self, name: str, router: WatchedRouter) -> None:
        self.name, self.is_checked = name, False
        linear: Any = linear_of(router.module, router.contract.linear)
        if full_shape(linear.weight)[0] != router.contract.num_experts:
            raise _refusal(name, router.module, "not all of its logits are of experts that compete")
        super().__init__(router)
        self.handles.append(self.router.register_forward_hook(self._replace, with_kwargs=True))

    def _replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        contract = self.contract
        logits_TE, indices_TK = self.read(args, kwargs, output)
        indices_TK = indices_TK.long()
        first_T1 = indices_TK.gather(1, logits_TE.gather(1, indices_TK).argmax(1, keepdim=True))
        without_TE = logits_TE.scatter(1, first_T1, _NEVER)
        parts = as_tuple(output)
        if contract.carrier == contract.logits:  # its block selects the experts
            without = without_TE.view_as(parts[contract.carrier])
            return (*parts[: contract.carrier], without, *parts[contract.carrier + 1 :]) if parts is output else without
        if not self.is_checked:
            again = as_tuple(self._finish(logits_TE, args, kwargs))
            if not _are_close(parts[contract.carrier], again[contract.carrier]):
                raise _refusal(self.name, module, "its head does not give the same weights when given its logits alone")
            self.is_checked = True
        return self._finish_without(without_TE, first_T1, args, kwargs)

    def _finish_without(
        self, without_TE: Tensor, first_T1: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute the router's output for logits without each token's first expert."""
        result = self._finish(without_TE, args, kwargs)
        biases = self._biases(args, kwargs)
        # A selection bias alone may select an expert without a score. It is shared by all tokens, so the tokens of each
        # first expert are handled separately.
        for expert in first_T1.unique().tolist() if biases else ():
            with _out_of_reach(biases, expert):
                own = self._finish(without_TE, args, kwargs)
            pairs = zip(as_tuple(result), as_tuple(own), strict=True)
            result = tuple(self._in_rows(first_T1[:, 0] == expert, new, old) for old, new in pairs)
        if (self.contract.chosen_experts(as_tuple(result), without_TE) == first_T1).any():
            raise _refusal(self.name, self.router, "its head selects it again without a score")
        return result

    def _in_rows(self, rows_T: Tensor, new: Any, old: Any) -> Any:
        """Merge one part of a head's output: new values for some tokens, old values for the others."""
        if not isinstance(old, Tensor):
            return old
        if old.shape[:1] == rows_T.shape:
            return torch.where(rows_T.view(-1, *[1] * (old.dim() - 1)), new, old)
        if not torch.equal(new, old):
            raise _refusal(self.name, self.router, "it selects with a bias, and its head's output is not by token")
        return old

    def _biases(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors with one number per expert besides the linear map, in the router or passed to it."""
        linear: Any = linear_of(self.router, self.contract.linear)
        own = {id(linear.weight), id(getattr(linear, "bias", None))}
        given = [value for value in (*args, *kwargs.values())[1:] if isinstance(value, Tensor)]
        return [
            tensor
            for tensor in (*self.router.parameters(), *self.router.buffers(), *given)
            if tensor.is_floating_point() and tensor.numel() == self.contract.num_experts and id(tensor) not in own
        ]

    def _finish(self, logits_TE: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the router's output for given logits."""
        router, contract = self.router, self.contract
        if not args:  # families name their hidden states differently
            kwargs = dict(kwargs)
            args = (kwargs.pop(next(iter(kwargs))),)
        base_class = router.base_class if isinstance(router, SymphonyRouter) else type(router)
        stand_in = router.stand_in if isinstance(router, SymphonyRouter) else stand_in_class(base_class)
        replaced, hidden = substitute_logits(
            router, stand_in, contract.linear, contract.calls_linear, logits_TE, args[0], contract.parameters
        )
        return base_class.forward(replaced, hidden, *args[1:], **kwargs)  # type: ignore[arg-type]


@contextmanager
def _out_of_reach(biases: list[Tensor], expert: int) -> Iterator[None]:
    """Exclude an expert from all biases, in place, since families keep them in different places."""
    kept = [bias.detach().view(-1)[expert].clone() for bias in biases]
    try:
        for bias in biases:
            bias.detach().view(-1)[expert] = _NEVER
        yield
    finally:
        for bias, value in zip(biases, kept, strict=True):
            bias.detach().view(-1)[expert] = value


def _are_close(weights: Tensor, again: Tensor) -> bool:
    return weights.shape == again.shape and torch.allclose(weights.float(), again.float(), rtol=1e-2, atol=1e-3)


def _refusal(name: str, module: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(module).__name__} `{name}`: its first expert cannot be left out: {reason}")
