"""A family's tiny model with and without graphs, an independent reference for it, and the comparisons of checks."""

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.errors import SymphonyError
from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.symphonize import symphonize, symphony_routers

from .batches import tiny_batch, tiny_images
from .tiny import tiny_model


class ConformanceError(SymphonyError, AssertionError):
    """A family fails a check."""


def require(holds: bool, complaint: str) -> None:
    """Raise ConformanceError if a condition does not hold."""
    if not holds:
        raise ConformanceError(complaint)


def require_close(got: Tensor, expected: Tensor, name: str) -> None:
    """Compare float32 sums taken in different orders: a few ulps a layer, on logits of order 1."""
    off = float((got.float() - expected.float()).abs().max())
    require(off <= 2e-4 * max(1.0, float(expected.abs().max())), f"{name}: off by {off:.3g}")


UPSTREAM_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors with which stock models fail."""


class Specimen:
    """One family under test. Models are built on first access.

    Args:
        family: Its model type, such as `mixtral`.
        dtype: Data type of its weights.

    Raises:
        ValueError: If the family has no tiny model, with the reason.
    """

    def __init__(self, family: str, dtype: torch.dtype = torch.float32) -> None:
        self.family = family
        self.base = tiny_model(family, dtype=dtype)
        self.batch = self._inputs(tiny_batch(self.base))

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cast a batch to the dtype of the model's weights."""
        dtype = self.base.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}

    @cached_property
    def images(self) -> dict[str, Tensor] | None:
        """A batch with images; None for a text-only family."""
        batch = tiny_images(self.base)
        return None if batch is None else self._inputs(batch)

    def symphonized(self, **settings: Any) -> PreTrainedModel:
        """Return a symphonized copy of the base."""
        return symphonize(copy.deepcopy(self.base), **settings)

    @cached_property
    def patched(self) -> PreTrainedModel:
        """A symphonized copy with a random graph in every router."""
        return put_random_graphs(self.symphonized())

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The base with each router's weight replaced by A W, computed by loops; `patched` must equal it."""
        model = copy.deepcopy(self.base)
        for name, contract, matrix in self.naive_matrices():
            linear: Any = linear_of(model.get_submodule(name), contract.linear)
            for tensor in (linear.weight, getattr(linear, "bias", None)):
                if isinstance(tensor, Tensor):
                    with torch.no_grad():
                        tensor[: contract.num_experts] = mix_rows(matrix, tensor[: contract.num_experts])
        return model

    def naive_matrices(self) -> Iterator[tuple[str, RouterContract, list[list[float]]]]:
        """Yield the name, the contract and the transition matrix A of each router of `patched`."""
        for name, router in symphony_routers(self.patched):
            graph = router.symphony
            assert isinstance(graph, ExpertGraph)
            yield name, router.contract, naive_transition(graph.adjacency.tolist())

    def logits(self, model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
        """Return the logits of a batch, in evaluation mode."""
        with torch.no_grad():
            return model.eval()(**(self.batch if batch is None else batch)).logits

    def training_outputs(self, model: nn.Module, batch: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """Return the outputs of a seeded training forward: some families drop out or sample."""
        torch.manual_seed(0)
        return model.train()(**(self.batch if batch is None else batch), **kwargs)


def put_random_graphs(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Replace every router's co-selection graph by a random one."""
    generator = torch.Generator().manual_seed(seed)
    for _, router in symphony_routers(model):
        graph = router.symphony
        assert isinstance(graph, ExpertGraph)
        random_EE = torch.rand(graph.num_experts, graph.num_experts, generator=generator)
        with torch.no_grad():
            graph.adjacency.copy_(random_EE + random_EE.T)
    return model


def naive_transition(adjacency: list[list[float]]) -> list[list[float]]:
    """Compute the row-stochastic matrix of a graph at strength 1, by loops in double precision."""
    return [[value / sum(row) for value in row] for row in adjacency]


def mix_rows(matrix: list[list[float]], rows: Tensor) -> Tensor:
    """Compute sum_k a_jk row_k, by loops in double precision."""
    mixed = []
    for coefficients in matrix:
        total = torch.zeros_like(rows[0], dtype=torch.float64)
        for coefficient, row in zip(coefficients, rows, strict=True):
            total = total + coefficient * row.double()
        mixed.append(total)
    return torch.stack(mixed).to(rows.dtype)
