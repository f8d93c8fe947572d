"""A family's tiny model, plain and with graphs put in, and an independent form of the latter to compare with."""

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.symphonize import symphonize, symphony_routers

from .batches import tiny_batch, tiny_images
from .tiny import tiny_model


class Specimen:
    """One family under test. Models are made when they are first asked for.

    Args:
        family: Its model type, such as `mixtral`.
        dtype: Of its weights.

    Raises:
        ValueError: If the family has no tiny model, with the reason.
    """

    def __init__(self, family: str, dtype: torch.dtype = torch.float32) -> None:
        self.family = family
        self.base = tiny_model(family, dtype=dtype)
        self.batch = self._inputs(tiny_batch(self.base))

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch in the type of the model's weights, as a processor's would be cast."""
        dtype = self.base.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}

    @cached_property
    def images(self) -> dict[str, Tensor] | None:
        """A batch with images; None for a family of text alone."""
        batch = tiny_images(self.base)
        return None if batch is None else self._inputs(batch)

    def symphonized(self, **settings: Any) -> PreTrainedModel:
        """A copy of the base, symphonized, at its start."""
        return symphonize(copy.deepcopy(self.base), **settings)

    @cached_property
    def patched(self) -> PreTrainedModel:
        """A copy with a random graph in every router, as long training would leave one."""
        return put_random_graphs(self.symphonized())

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The base with each router's weight replaced by A W, computed by loops: what `patched` must equal."""
        model = copy.deepcopy(self.base)
        for name, contract, matrix in self.naive_matrices():
            linear: Any = linear_of(model.get_submodule(name), contract.linear)
            for tensor in (linear.weight, getattr(linear, "bias", None)):
                if isinstance(tensor, Tensor):
                    with torch.no_grad():
                        tensor[: contract.num_experts] = mix_rows(matrix, tensor[: contract.num_experts])
        return model

    def naive_matrices(self) -> Iterator[tuple[str, RouterContract, list[list[float]]]]:
        """(router's name, its contract, the matrix A of its random graph) for each router of `patched`."""
        for name, router in symphony_routers(self.patched):
            graph = router.symphony
            assert isinstance(graph, ExpertGraph)
            yield name, router.contract, naive_transition(graph.adjacency.tolist())

    def logits(self, model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
        """What a model answers to a batch, in evaluation."""
        with torch.no_grad():
            return model.eval()(**(self.batch if batch is None else batch)).logits

    def training_outputs(self, model: nn.Module, batch: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """The outputs of a seeded training forward: some families drop out, or sample, by nature."""
        torch.manual_seed(0)
        return model.train()(**(self.batch if batch is None else batch), **kwargs)


def put_random_graphs(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Put a random social graph into every router."""
    generator = torch.Generator().manual_seed(seed)
    for _, router in symphony_routers(model):
        graph = router.symphony
        assert isinstance(graph, ExpertGraph)
        random_EE = torch.rand(graph.num_experts, graph.num_experts, generator=generator)
        with torch.no_grad():
            graph.adjacency.copy_(random_EE + random_EE.T)
    return model


def naive_transition(adjacency: list[list[float]]) -> list[list[float]]:
    """The row-stochastic matrix of a graph, at strength 1, by loops in double precision."""
    return [[value / sum(row) for value in row] for row in adjacency]


def mix_rows(matrix: list[list[float]], rows: Tensor) -> Tensor:
    """sum_k a_jk row_k, by loops in double precision."""
    mixed = []
    for coefficients in matrix:
        total = torch.zeros_like(rows[0], dtype=torch.float64)
        for coefficient, row in zip(coefficients, rows, strict=True):
            total = total + coefficient * row.double()
        mixed.append(total)
    return torch.stack(mixed).to(rows.dtype)
