"""Summary statistics over all graphs of a model, cheap enough for every log of a training run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .routing_metrics import DEAD


def graph_summary(graphs: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Summarize a model\'s graphs as means over its routers.

    Args:
        graphs: Adjacency by router. Shape of each: (num_experts, num_experts).
        before: The same at an earlier time, for `drift`.

    Returns:
        `load_entropy`: over its maximum, log E; 1 when even. `dead_experts`: the share of experts with less than a
        tenth of the even load. `busiest`: the highest load over the even one. `neighbours`: the share of the graph's
        mass between different experts; it starts at 0 and tends to (K - 1) / K. `drift`: how far the graphs moved since
        `before`, relative to their size (Frobenius); 0 without `before`.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for name, adjacency_EE in graphs.items():
        adjacency_EE = adjacency_EE.double()
        load_E = adjacency_EE.diagonal() / adjacency_EE.diagonal().sum()
        num_experts = len(load_E)
        entropy = torch.special.entr(load_E).sum() / torch.tensor(float(num_experts)).log()
        dead = (load_E < DEAD / num_experts).double().mean()
        busiest = load_E.max() * num_experts
        neighbours = 1 - adjacency_EE.diagonal().sum() / adjacency_EE.sum()
        moved = torch.zeros(()) if before is None else (adjacency_EE - before[name].to(adjacency_EE)).norm()
        values = torch.stack([entropy, dead, busiest, neighbours, moved / adjacency_EE.norm()])
        sums += values.to(sums.device)
    names = ("load_entropy", "dead_experts", "busiest", "neighbours", "drift")
    return dict(zip(names, (sums / len(graphs)).tolist(), strict=True))
