"""Hooks by which a forward's routers are recorded or replayed, also where checkpointing runs them again in backward."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import PreTrainedModel

from symphony_hf.errors import PatchError, UnsupportedModelError
from symphony_hf.patching.families.discovery import FoundRouter
from symphony_hf.patching.observations import backward_starts
from symphony_hf.patching.symphonize import all_routers

from .cache_rows import CacheRows, cache_in
from .layout import TokenLayout, read_layout
from .selection import SelectionTap, tapped_module, why_not_replayed


class RoutedForward:
    """One forward of the model, kept until its backward can no longer run.

    Args:
        layout: The sequences of its tokens.
        first: Index of the first of them, among all sequences of the context.
        given_LTK: Choices to replay, -1 where a router chooses itself; None to record. Shape: (layers, tokens, top_k).

    Attributes:
        routers: Index of the router of each call so far.
        chosen: Choices of each call so far. Shape of each: (tokens, top_k).
        closed: Whether the forward has ended. What runs after that is a recomputation.
    """

    def __init__(self, layout: TokenLayout, first: int, given_LTK: Tensor | None = None) -> None:
        self.layout = layout
        self.first = first
        self.given_LTK = given_LTK
        self.routers: list[int] = []
        self.chosen: list[Tensor] = []
        self.closed = False
        self._num_recomputed: dict[int, int] = {}

    def given_to(self, router: int) -> Tensor | None:
        """Return the choices for a call of a router that begins. In backward, a router's calls come in reverse."""
        if self.given_LTK is None:
            return None
        if not self.closed:
            return self.given_LTK[len(self.routers)] if len(self.routers) < len(self.given_LTK) else None
        calls = [call for call, index in enumerate(self.routers) if index == router]
        done = self._num_recomputed.get(router, 0)
        self._num_recomputed[router] = done + 1
        return self.given_LTK[calls[-1 - done % len(calls)]]


class RoutingHooks:
    """Hooks of a model and its routers for one context.

    The classes of the model stay as they are. After the context the hooks go, at once or, where a backward may still
    run a layer again, with the tensors of its forward.

    Args:
        model: Any supported model, also wrapped.
        call: The call, for error messages.
        open_forward: Makes the record of a forward that begins, from its layout.
        close_forward: Takes that of a forward that has ended; one that fails leaves no trace.

    Raises:
        UnsupportedModelError: If a router of the model does not choose by a top-k, or the model has none.
        PatchError: If the model is compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        call: str,
        open_forward: Callable[[TokenLayout], RoutedForward],
        close_forward: Callable[[RoutedForward], None],
    ) -> None:
        self.call = call
        self.open_forward, self.close_forward = open_forward, close_forward
        _refuse_compiled(model, call)
        self.model = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
        self.routers = decoder_routers(self.model)
        modules = dict(self.model.named_modules())
        for reason, router in ((why_not_replayed(router), router) for router in self.routers):
            if reason:
                raise UnsupportedModelError(f"{call}: {type(router.module).__name__} `{router.name}`: {reason}")
        if any(getattr(router.module, "gradient_of_others", None) is not None for router in self.routers):
            raise PatchError(
                f"{call}: a `router_gradient` of other experts chooses these by a top-k of its own, which cannot be "
                "told from the router's: symphonize with router_gradient='chosen'"
            )
        self._parameters = inspect.signature(self.model.forward)
        self._current: RoutedForward | None = None
        self._cache_rows = CacheRows()
        self._taps: list[tuple[int, SelectionTap | None]] = []
        self._is_open = True
        self._num_kept = 0
        self._handles: list[Any] = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
        ]
        for index, router in enumerate(self.routers):
            module = tapped_module(router, modules)
            before, after = (functools.partial(f, index) for f in (self._before_router, self._after_router))
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, always_call=True, prepend=True))

    def close(self) -> None:
        """End the context."""
        self._is_open = False
        self._cache_rows.clear()
        while self._taps:  # of routers that a KeyboardInterrupt broke off, past the hooks that leave them
            _, tap = self._taps.pop()
            if tap is not None:
                tap.__exit__(None, None, None)
        self._remove_if_done()

    def _remove_if_done(self) -> None:
        if not self._is_open and not self._num_kept:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        if self._is_open:
            arguments = self._arguments(args, kwargs)
            layout = read_layout(model, arguments)
            if layout.continues and not self._cache_rows.are_kept(cache_in(arguments)):
                raise PatchError(
                    f"{self.call}: the rows of the cache are not those of the forward before, so the tokens before "
                    "these are not known: beam search reorders them. Generate with num_beams=1, or call the model with "
                    "one cache at a time"
                )
            self._current = self.open_forward(layout)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = self._parameters.bind_partial(*args, **kwargs).arguments
        return {**arguments.pop("kwargs", {}), **arguments}

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward, self._current = self._current, None
        if forward is None or output is None:
            return  # outside of the context, or after an error
        forward.closed = True
        made = dict(output) if isinstance(output, dict) else {}
        self._cache_rows.note(cache_in({**self._arguments(args, kwargs), **made}))
        if forward.given_LTK is not None and len(forward.routers) != len(forward.given_LTK):
            raise PatchError(
                f"{self.call}: {len(forward.routers)} calls of routers in a forward, for the choices of "
                f"{len(forward.given_LTK)} layers: was a layer dropped?"
            )
        self.close_forward(forward)
        reached = backward_starts(output)
        for tensor in reached:
            tensor.register_hook(functools.partial(self._begin_backward, forward))
        if reached and forward.given_LTK is not None:
            self._num_kept += 1
            weakref.finalize(forward, self._drop)

    def _drop(self) -> None:
        self._num_kept -= 1
        self._remove_if_done()

    def _begin_backward(self, forward: RoutedForward, gradient: Tensor) -> None:
        if self._current is not forward:
            self._current = forward
            Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._current = None

    def _before_router(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        forward, router = self._current, self.routers[index]
        if forward is None:
            self._taps.append((index, None))
            if self._is_open:
                raise PatchError(
                    f"{self.call}: the router `{router.name}` ran outside of a forward of {type(self.model).__name__}, "
                    "so the tokens that it gets are not known: call the whole model"
                )
            return
        tap = SelectionTap(router.contract.num_experts, forward.given_to(index))
        self._taps.append((index, tap))
        tap.__enter__()

    def _after_router(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._taps or self._taps[-1][0] != index:
            return  # another's hook raised before ours ran
        (_, tap), forward = self._taps.pop(), self._current
        if tap is None:
            return
        tap.__exit__(None, None, None)
        if output is None or forward is None:
            return  # an exception, or checkpointing stopped the recomputation early
        chosen_TK, given_TK, num_tokens = tap.chosen_TK, tap.given_TK, len(forward.layout.index_T)
        got = () if chosen_TK is None else tuple(chosen_TK.shape)
        wanted = (num_tokens, *got[1:]) if given_TK is None else tuple(given_TK.shape)
        if chosen_TK is None or got != wanted:
            choice = f"experts of shape {got}" if got else "no experts by a top-k"
            raise PatchError(
                f"{self.call}: the router `{self.routers[index].name}` chose {choice}, where (tokens, top_k) = {wanted}"
                " was expected"
            )
        if not forward.closed:
            forward.routers.append(index)
            if given_TK is None:
                forward.chosen.append(chosen_TK.to(torch.int16))


def decoder_routers(model: nn.Module) -> list[FoundRouter]:
    """Return the routers of a model that get the tokens of its sequences: those of an image encoder are left out.

    Raises:
        UnsupportedModelError: If there is none, or the model has an encoder and a decoder, with tokens of their own.
    """
    found = all_routers(model)
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel):
        return found
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__}: its encoder and its decoder route different tokens")
    of_text = (type(model.config), type(model.config.get_text_config()))
    inside = [router for router in found if type(getattr(router.owner, "config", config)) in of_text]
    inside = [router for router in inside if router.contract.image_tokens is not True]
    if not inside:
        raise UnsupportedModelError(f"{type(model).__name__}: all of its routers get images, not tokens")
    return inside


def _refuse_compiled(model: nn.Module, call: str) -> None:
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise PatchError(
                f"{call}: `{name or type(model).__name__}` is compiled, and what is compiled does not see hooks: give "
                "the model before `torch.compile`"
            )
