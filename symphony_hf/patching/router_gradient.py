"""The router's gradient from experts that a token did not choose, in an unchanged forward.

`routing/gradient.py` derives the gradient. In the forward, a router makes weights of all experts that take part, and
hands on those of the chosen ones. In the backward pass, once the gradient of the experts' output is known, the others
run without gradient. Only the product of their output with it, one number a token and expert, goes to the router.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from symphony_hf.errors import PatchError, UnsupportedModelError
from symphony_hf.patching.families.contract import EXPERTS
from symphony_hf.patching.families.discovery import FoundRouter
from symphony_hf.routing.gradient import all_others, mixture_weights, nearest_others, random_others
from symphony_hf.routing.graph import transition_matrix

from .expert_graph import ExpertGraph, active_graph


def attach_gradients(model: nn.Module, found: list[FoundRouter]) -> Iterator[Any]:
    """Attach the gradient that the settings ask for to every router. Yields the handles of the hooks."""
    for number, router in enumerate(found):
        if active_graph(router.module.symphony).config.router_gradient != "chosen":  # type: ignore[arg-type]
            block = model.get_submodule(router.name.rpartition(".")[0])
            gradient = GradientOfOthers(router.name, router.owner, block, seed=number)
            router.module.gradient_of_others = gradient  # type: ignore[assignment]
            experts = getattr(block, EXPERTS)
            yield experts.register_forward_hook(gradient.after_experts, with_kwargs=True)


class GradientOfOthers:
    """Carries the gradient of experts that a token did not choose from a block's experts to its router.

    Args:
        name: The router's module name, for error messages.
        owner: The decoder stack that it is in.
        block: The module with the router and the experts.
        seed: Seed of the draws of random experts.
    """

    def __init__(self, name: str, owner: nn.Module, block: nn.Module, seed: int) -> None:
        self.name = name
        self.owner = owner
        self.block = block
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._awaited: _Exchange | None = None
        self._is_checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradientOfOthers":
        """Copy with the model. A router that is copied alone, as PEFT does, keeps its experts."""
        if id(self.owner) not in memo and id(self.block) not in memo:
            return self
        copied = memo[id(self)] = GradientOfOthers.__new__(GradientOfOthers)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None, "_awaited": None}

    def extend(self, router: Any, logits_TE: Tensor, weights: Tensor, chosen_TK: Tensor) -> Tensor:
        """Return the chosen experts' weights, as they are, with the gradient of all that take part.

        Args:
            router: The router that runs: the one in the block, or PEFT's copy of it.
            logits_TE: Its logits. Shape: (tokens, num_experts).
            weights: Weights of the chosen experts. Shape: (..., top_k).
            chosen_TK: The chosen experts. Shape: (tokens, top_k).
        """
        others_TN = self._others(active_graph(router.symphony), chosen_TK)
        weights_TK = weights.reshape(chosen_TK.shape)
        mixture = mixture_weights(logits_TE, weights_TK, chosen_TK, others_TN, router.contract.weighting)
        self._awaited = exchange = _Exchange(self, chosen_TK, weights_TK.detach())
        if torch.compiler.is_compiling():
            exchange.others = others_TN, mixture[1]
            return (weights_TK.detach() + (mixture[0] - mixture[0].detach())).view_as(weights)
        extended: Tensor = _ExtendWeights.apply(weights_TK.detach(), *mixture, others_TN, exchange)
        return extended.view_as(weights)

    @torch.no_grad()
    def _others(self, graph: ExpertGraph, chosen_TK: Tensor) -> Tensor:
        config = graph.config
        if config.router_gradient == "dense":
            return all_others(chosen_TK, graph.num_experts)
        if config.router_gradient == "random":
            return random_others(chosen_TK, graph.num_experts, config.num_neighbours, self._draws(chosen_TK.device))
        if graph.is_partitioned:
            raise PatchError(
                f"`{self.name}`: router_gradient='neighbours' reads the graph, of which each rank holds a part: use "
                "graph='ema', or another router_gradient"
            )
        partners_EE = transition_matrix(graph.symmetrized(), config.normalization, config.self_loops)
        return nearest_others(chosen_TK, partners_EE, config.num_neighbours)

    def _draws(self, device: torch.device) -> torch.Generator | None:
        """Return a generator of its own, which leaves the draws of dropout as they are; a compiler takes none."""
        if torch.compiler.is_compiling():
            return None
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def after_experts(
        self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Hook of the experts: in the backward pass, note their input and the gradient of their output.

        A compiler cannot trace that, so there the others run in the forward, and the backward may keep their outputs.
        """
        exchange, self._awaited = self._awaited, None
        if exchange is None or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        hidden_TD, chosen_TK, weights_TK = (*args, *kwargs.values())[:3]
        if exchange.others is not None:
            others_TN, mixture_TN = exchange.others
            with torch.no_grad():
                outputs_TND = torch.cat(list(self._run(exchange, hidden_TD, others_TN)), dim=1)
            term_TD = (mixture_TN.unsqueeze(-1) * outputs_TND).sum(1)
            return output + (term_TD - term_TD.detach())
        exchange.autocast = _autocast_of(hidden_TD)
        if not self._is_checked:
            self._check(exchange, experts, hidden_TD, chosen_TK, weights_TK)
        noted: Tensor = _NoteGradient.apply(output, hidden_TD.detach(), exchange)
        return noted

    def _check(
        self, exchange: "_Exchange", experts: nn.Module, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor
    ) -> None:
        """Check, in the first forward, that the experts got what the router gave, and that they can run again."""
        is_flat = hidden_TD.dim() == 2 and len(hidden_TD) == len(chosen_TK) and chosen_TK.shape == weights_TK.shape
        is_given = is_flat and torch.equal(chosen_TK, exchange.chosen_TK)
        if not is_given or not torch.equal(weights_TK, exchange.weights_TK.to(weights_TK.dtype)):
            raise UnsupportedModelError(
                f"`{self.name}`: its block {type(self.block).__name__} changes the router's choices or weights before "
                "the experts get them, so the gradient of experts that were not chosen is not known: use "
                "router_gradient='chosen'"
            )
        if any(hasattr(parameter, "ds_id") for parameter in experts.parameters()):
            raise UnsupportedModelError(
                f"`{self.name}`: router_gradient runs experts in the backward pass, where ZeRO-3 cannot gather their "
                "weights: use ZeRO-2, or router_gradient='chosen'"
            )
        self._is_checked = True

    @torch.no_grad()
    def products(self, exchange: "_Exchange", others_TN: Tensor) -> Tensor:
        """Run other experts on a forward's tokens, and multiply their outputs with the gradient of its output.

        Args:
            exchange: What the backward pass brought.
            others_TN: Experts; -1 for none, which gives some number. Shape: (tokens, n).

        Returns:
            <dL/dy, E_i(x)>. Shape: (tokens, n).
        """
        hidden_TD, gradient_TD = exchange.take()
        with exchange.autocast, _draws_of_its_own(hidden_TD.device):
            products = [
                torch.bmm(outputs_TND.to(gradient_TD.dtype), gradient_TD.unsqueeze(-1)).squeeze(-1)
                for outputs_TND in self._run(exchange, hidden_TD, others_TN)
            ]
        return torch.cat(products, dim=1)

    def _run(self, exchange: "_Exchange", hidden_TD: Tensor, others_TN: Tensor) -> Iterator[Tensor]:
        """Yield the outputs of other experts, as many for each token at a time as it chose. Shape: (tokens, n, D)."""
        num_tokens, top_k = exchange.chosen_TK.shape
        for others in others_TN.clamp(min=0).split(top_k, dim=1):
            index = others.reshape(-1, 1).to(exchange.chosen_TK.dtype)
            ones = torch.ones_like(index, dtype=exchange.weights_TK.dtype)
            # By its name in the block: PEFT puts a module with the experts' LoRA in their place.
            outputs = getattr(self.block, EXPERTS)(hidden_TD.repeat_interleave(others.shape[1], dim=0), index, ones)
            yield outputs.view(num_tokens, others.shape[1], -1)


class _Exchange:
    """State that one forward of a block leaves for its backward.

    Attributes:
        chosen_TK: The chosen experts.
        weights_TK: Their weights.
        autocast: The autocast that the experts ran under.
        others: The other experts and their weights, under a compiler.
    """

    def __init__(self, carrier: GradientOfOthers, chosen_TK: Tensor, weights_TK: Tensor) -> None:
        self.carrier = carrier
        self.chosen_TK = chosen_TK
        self.weights_TK = weights_TK
        self.autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.others: tuple[Tensor, Tensor] | None = None
        self._arrived: tuple[Tensor, Tensor] | None = None

    def bring(self, hidden_TD: Tensor, gradient_TD: Tensor) -> None:
        """Note the experts' input and the gradient of their output."""
        self._arrived = hidden_TD, gradient_TD

    def take(self) -> tuple[Tensor, Tensor]:
        """Return what was brought, and let it go: the graph may outlive its backward."""
        assert self._arrived is not None  # the weights' gradient comes through the experts' output
        arrived, self._arrived = self._arrived, None
        return arrived


class _ExtendWeights(torch.autograd.Function):
    """Identity on the stock weights.

    Its backward sends the gradient to the mixture's weights, and runs the other experts for theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, mixture_TK: Tensor, mixture_TN: Tensor, others_TN: Tensor, exchange: _Exchange
    ) -> Tensor:
        ctx.save_for_backward(others_TN)
        ctx.exchange = exchange
        return weights_TK.clone()  # not a view: blocks renormalize in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TK: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        (others_TN,) = ctx.saved_tensors
        products_TN = None
        if ctx.needs_input_grad[2] and others_TN.numel():
            products_TN = ctx.exchange.carrier.products(ctx.exchange, others_TN).to(gradient_TK.dtype)
        return None, gradient_TK, products_TN, None, None


class _NoteGradient(torch.autograd.Function):
    """Identity on the experts' output; its backward notes the gradient, and the experts' input, which it has saved."""

    @staticmethod
    def forward(ctx: Any, output_TD: Tensor, hidden_TD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.save_for_backward(hidden_TD)
        ctx.exchange = exchange
        return output_TD.clone()  # not a view: blocks scale it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        (hidden_TD,) = ctx.saved_tensors
        ctx.exchange.bring(hidden_TD, gradient_TD)
        return gradient_TD, None, None


def _autocast_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


def _draws_of_its_own(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave the random numbers of the forwards to come as they are, where experts have dropout."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
