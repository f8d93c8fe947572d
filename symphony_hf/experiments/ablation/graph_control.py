"""Graphs that are frozen, shuffled, or used late in training or only after it."""

import dataclasses

import torch
from torch import Tensor, nn

from symphony_hf.patching.expert_graph import ExpertGraph, active_graph
from symphony_hf.patching.symphonize import symphony_routers

from .point import Point


def frozen_after(point: Point, steps: int) -> int:
    """Return the number of updates before a frozen graph stops."""
    return max(1, round(point.freeze_after * steps))


class GraphControl:
    """Freezes, shuffles or weakens graphs during training. Call its methods around `update_graphs`, and at the end.

    Args:
        model: A Symphony model.
        point: Point whose `graph` is applied; `frozen`, `random`, `inference` and `late` have an effect.
        steps: Number of updates of the whole run.
        seed: Seed of the shuffling, which differs between routers.
    """

    def __init__(self, model: nn.Module, point: Point, steps: int, seed: int) -> None:
        self.kind = point.graph
        self.graphs: list[ExpertGraph] = [active_graph(router.symphony) for _, router in symphony_routers(model)]
        self.strength, self.steps = point.strength, steps
        self.freeze_at = frozen_after(point, steps)
        self.updates = 0
        generator = torch.Generator().manual_seed(seed)
        self.orders = [torch.randperm(graph.num_experts, generator=generator) for graph in self.graphs]
        self.learned = [graph.adjacency.detach().clone() for graph in self.graphs]

    @torch.no_grad()
    def before_update(self) -> None:
        """Restore the moving average for the update."""
        if self.kind == "random":
            for graph, learned_EE in zip(self.graphs, self.learned, strict=True):
                graph.adjacency.copy_(learned_EE)

    @torch.no_grad()
    def after_update(self) -> None:
        """Set the graph that the next forward routes by."""
        self.updates += 1
        if self.kind == "random":
            for index, (graph, order_E) in enumerate(zip(self.graphs, self.orders, strict=True)):
                self.learned[index] = graph.adjacency.clone()
                graph.adjacency.copy_(shuffled(graph.adjacency, order_E))
        elif self.kind == "frozen" and self.updates <= self.freeze_at:
            self.learned = [graph.adjacency.clone() for graph in self.graphs]
        elif self.kind == "frozen":
            for graph, learned_EE in zip(self.graphs, self.learned, strict=True):
                graph.adjacency.copy_(learned_EE)
        elif self.kind == "late":
            self._set_strength(self.strength * max(0.0, 2 * self.updates / self.steps - 1))

    def after_training(self) -> None:
        """Set what the trained model routes by."""
        if self.kind in ("inference", "late"):
            self._set_strength(self.strength)

    def _set_strength(self, strength: float) -> None:
        for graph in self.graphs:
            graph.config = dataclasses.replace(graph.config, strength=strength)


def shuffled(adjacency_EE: Tensor, order_E: Tensor) -> Tensor:
    """Permute the experts of a graph, which keeps its weights and spectrum.

    Args:
        adjacency_EE: A co-selection graph. Shape: (num_experts, num_experts).
        order_E: A permutation of the experts. Shape: (num_experts,).

    Returns:
        Q adjacency Q^T with the permutation matrix Q. Same shape.
    """
    return adjacency_EE[order_E][:, order_E]
