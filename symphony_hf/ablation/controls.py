"""Graphs that no setting of the library gives, set around each update: frozen after a while, or shuffled."""

import torch
from torch import Tensor, nn

from ..graph import ExpertGraph, active_graph
from ..patching import symphony_routers
from .point import Point


def frozen_after(point: Point, steps: int) -> int:
    """How many of a run's updates a frozen graph takes part in."""
    return max(1, round(point.freeze_after * steps))


class GraphControl:
    """Call `before_update` and `after_update` around `update_graphs`; without either, nothing is changed.

    Args:
        model: A Symphony model.
        point: Whose `graph` decides: `frozen` or `random` do something, all others nothing.
        steps: Updates of the whole run.
        seed: Of the shuffling, which is drawn anew for each router.
    """

    def __init__(self, model: nn.Module, point: Point, steps: int, seed: int) -> None:
        self.kind = point.graph
        self.graphs: list[ExpertGraph] = [active_graph(router.symphony) for _, router in symphony_routers(model)]
        self.freeze_at = frozen_after(point, steps)
        self.updates = 0
        generator = torch.Generator().manual_seed(seed)
        self.orders = [torch.randperm(graph.num_experts, generator=generator) for graph in self.graphs]
        self.learned = [graph.adjacency.detach().clone() for graph in self.graphs]

    @torch.no_grad()
    def before_update(self) -> None:
        """Put the moving average back, so that the update goes on from it."""
        if self.kind == "random":
            for graph, learned_EE in zip(self.graphs, self.learned, strict=True):
                graph.adjacency.copy_(learned_EE)

    @torch.no_grad()
    def after_update(self) -> None:
        """Put in place what the next forward routes by."""
        self.updates += 1
        if self.kind == "random":
            for place, (graph, order_E) in enumerate(zip(self.graphs, self.orders, strict=True)):
                self.learned[place] = graph.adjacency.clone()
                graph.adjacency.copy_(shuffled(graph.adjacency, order_E))
        elif self.kind == "frozen" and self.updates <= self.freeze_at:
            self.learned = [graph.adjacency.clone() for graph in self.graphs]
        elif self.kind == "frozen":
            for graph, learned_EE in zip(self.graphs, self.learned, strict=True):
                graph.adjacency.copy_(learned_EE)


def shuffled(adjacency_EE: Tensor, order_E: Tensor) -> Tensor:
    """A graph with its experts renamed: the same weights and the same spectrum, between other experts.

    Args:
        adjacency_EE: A social graph. Shape: (num_experts, num_experts).
        order_E: A permutation of the experts. Shape: (num_experts,).

    Returns:
        Q adjacency Q^T, Q the permutation's matrix. Same shape.
    """
    return adjacency_EE[order_E][:, order_E]
