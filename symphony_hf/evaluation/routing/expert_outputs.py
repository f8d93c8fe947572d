"""Each expert's output on the same tokens, including those that it is not chosen for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.errors import UnsupportedModelError

from .hooks import routers_to_watch


class ExpertSample:
    """Sampled input tokens of one layer's experts, and the module that holds the experts.

    `name` is that of the layer's router. `hidden_TD` are the sampled hidden states, None before a forward pass.
    """

    def __init__(self, name: str, experts: nn.Module, num_experts: int) -> None:
        self.name, self.num_experts = name, num_experts
        self._experts = experts
        self.hidden_TD: Tensor | None = None
        self._weight_type = torch.float32

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> None:
        """Keep the tokens at some positions of one call of the experts.

        Raises:
            UnsupportedModelError: If the experts are not called with hidden states, indices and weights.
        """
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != len(args) + len(kwargs) or not _are_arguments(tensors):
            raise UnsupportedModelError(
                f"{type(self._experts).__name__} of `{self.name}`: its experts cannot be run one by one: they do not "
                "take hidden states, indices of experts, and weights"
            )
        hidden, _, weights = tensors
        self.hidden_TD = hidden.reshape(-1, hidden.shape[-1])[positions.to(hidden.device)].detach()
        self._weight_type = weights.dtype

    def outputs(self) -> Iterator[Tensor]:
        """Each expert's output on all sampled tokens, in order, with weight 1. Shape of each: (sampled, hidden)."""
        assert self.hidden_TD is not None
        num_tokens, device = len(self.hidden_TD), self.hidden_TD.device
        # With a second expert of weight 0, since some families need at least two.
        weights_T2 = torch.tensor([1.0, 0.0], device=device).to(self._weight_type).repeat(num_tokens, 1)
        for expert in range(self.num_experts):
            pair = torch.tensor([expert, (expert + 1) % self.num_experts], device=device)
            indices_T2 = pair.repeat(num_tokens, 1)
            yield self._experts(self.hidden_TD, indices_T2, weights_T2).flatten(1)


def _are_arguments(tensors: list[Tensor]) -> bool:
    if len(tensors) != 3:
        return False
    hidden, indices, weights = tensors
    is_choice = not indices.is_floating_point() and indices.shape == weights.shape and indices.dim() == 2
    return hidden.is_floating_point() and weights.is_floating_point() and is_choice


@contextmanager
def sampling_experts(model: nn.Module, positions: Tensor) -> Iterator[list[ExpertSample]]:
    """Sample input tokens of each MoE layer's experts in the forward pass that runs within this context.

    Args:
        model: Model, as in `routers_to_watch`.
        positions: Positions of the sampled tokens in the flattened batch. Shape: (sampled,), int64.

    Yields:
        One sample per layer, empty for a layer that did not run.

    Raises:
        UnsupportedModelError: On entry, if a router has no module `experts` next to it, or chooses from more experts
            than that holds, such as one that does nothing; in the forward pass, if that module takes other arguments
            than hidden states, indices and weights.
    """
    samples = []
    with ExitStack() as hooks:
        for name, router in routers_to_watch(model).items():
            block = model.get_submodule(name.rpartition(".")[0])
            experts = block._modules.get("experts")
            if experts is None or isinstance(experts, nn.ModuleList | nn.ModuleDict):
                raise UnsupportedModelError(
                    f"{type(router.module).__name__} `{name}`: its experts cannot be run one by one: "
                    f"{type(block).__name__} has no module `experts` that holds all"
                )
            num_experts = router.contract.num_experts
            if getattr(experts, "num_experts", num_experts) != num_experts:
                raise UnsupportedModelError(
                    f"{type(router.module).__name__} `{name}`: its experts cannot be run one by one: it chooses from "
                    f"{num_experts}, and {type(experts).__name__} holds {experts.num_experts}"
                )
            sample = ExpertSample(name, experts, num_experts)
            take = lambda _, args, kwargs, sample=sample: sample.take(args, kwargs, positions)  # noqa: E731
            hooks.enter_context(experts.register_forward_pre_hook(take, with_kwargs=True))
            samples.append(sample)
        yield samples
