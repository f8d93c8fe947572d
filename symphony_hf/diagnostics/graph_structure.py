"""The shape of one social graph of experts: its communities, who is central in it, and how far it moved."""

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor

from .graph_metrics import checked_graph

SEED = 0
"""Of the order in which communities are tried."""


def _as_network(adjacency_EE: Tensor) -> nx.Graph:
    """Without loops: an expert's load is no acquaintance."""
    weights_EE = checked_graph(adjacency_EE).clone().fill_diagonal_(0.0)
    return nx.from_numpy_array(weights_EE.numpy())


def communities(adjacency_EE: Tensor, seed: int = SEED) -> list[list[int]]:
    """Groups of experts that are chosen with one another more than with the rest.

    Args:
        adjacency_EE: A social graph. Shape: (num_experts, num_experts).
        seed: Of the order in which experts are moved.

    Returns:
        Every expert is in one; the largest first. An expert that was never chosen with another is alone.

    Raises:
        GraphError: If it is no social graph.

    Source: Blondel et al., "Fast unfolding of communities in large networks" (2008), by networkx.
    """
    network = _as_network(adjacency_EE)
    if not network.size():
        return [[expert] for expert in network]
    found = nx.community.louvain_communities(network, weight="weight", seed=seed)
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


def modularity(adjacency_EE: Tensor, groups: Sequence[Sequence[int]] | None = None) -> float:
    """How much of the graph's weight is within groups, less what would be there by chance.

    Q = sum over groups of w_in / w - (degree / 2w)^2, with w the weight of all edges between different experts, w_in of
    those within the group, and degree the sum of its experts' edges.

    Args:
        adjacency_EE: A social graph. Shape: (num_experts, num_experts).
        groups: Of experts, each in one; `communities` when None.

    Returns:
        Below 1; 0 for one group of all, and for a graph without edges. The expectation takes an expert to be able to
        meet itself, so unrelated experts score a little below 0, and the best groups of them above.

    Raises:
        GraphError: If it is no social graph.

    Source: Newman, "Modularity and community structure in networks" (2006), by networkx.
    """
    network = _as_network(adjacency_EE)
    if not network.size(weight="weight"):
        return 0.0
    return float(nx.community.modularity(network, groups or communities(adjacency_EE), weight="weight"))


def centrality(adjacency_EE: Tensor, damping: float = 0.85) -> Tensor:
    """Who is well connected to the well connected: the share of time that a walk along the graph is at each expert.

    PageRank, which unlike the leading eigenvector is there in graphs of several parts, too.

    Args:
        adjacency_EE: A social graph. Shape: (num_experts, num_experts).
        damping: The share of steps along the graph; the others go anywhere.

    Returns:
        Shares that sum to 1, float64. Shape: (num_experts,).

    Raises:
        GraphError: If it is no social graph.

    Source: Brin and Page, "The Anatomy of a Large-Scale Hypertextual Web Search Engine" (1998), by networkx.
    """
    network = _as_network(adjacency_EE)
    ranks = nx.pagerank(network, alpha=damping, weight="weight", tol=1e-10, max_iter=1000)
    return torch.tensor([ranks[expert] for expert in range(len(adjacency_EE))], dtype=torch.float64)


def drift(before_EE: Tensor, after_EE: Tensor) -> float:
    """How far a graph moved, relative to its size: |after - before| / |after|, by Frobenius' norm.

    Args:
        before_EE: A social graph. Shape: (num_experts, num_experts).
        after_EE: The same graph later. Same shape.

    Raises:
        GraphError: If one is no social graph, or they have different numbers of experts.
    """
    before_EE, after_EE = checked_graph(before_EE, len(after_EE)), checked_graph(after_EE)
    return float((after_EE - before_EE).norm() / after_EE.norm())
