"""Numbers that describe the co-selection graphs of experts.

Functions take one adjacency of shape (num_experts, num_experts): symmetric and non-negative, the moving average of the
share of tokens that select a pair of experts together, with each expert's load on the diagonal. They raise GraphError
for any other tensor.
"""

from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from symphony_hf.errors import GraphError
from symphony_hf.routing.graph import adjacency_problems, transition_matrix

from .routing_metrics import DEAD, normalized_entropy


def checked_graph(adjacency_EE: Tensor, num_experts: int | None = None) -> Tensor:
    """Return an adjacency in float64 on the CPU, or raise GraphError if it is not a co-selection graph."""
    if adjacency_EE.dim() != 2 or len(adjacency_EE) < 2:
        raise GraphError(f"an adjacency of at least 2 experts was expected, got shape {tuple(adjacency_EE.shape)}")
    problems = adjacency_problems(adjacency_EE, num_experts or len(adjacency_EE))
    if not problems and not adjacency_EE.diagonal().sum() > 0:
        problems.append("no load on the diagonal")
    if problems:
        raise GraphError(
            f"not a co-selection graph: {'; '.join(problems)}. Pass the adjacency, not the transition matrix"
        )
    return adjacency_EE.detach().to(device="cpu", dtype=torch.float64)


def load(adjacency_EE: Tensor) -> Tensor:
    """Compute each expert's share of all selections, float64. The shares sum to 1. Shape: (num_experts,)."""
    load_E = checked_graph(adjacency_EE).diagonal()
    return load_E / load_E.sum()


def load_entropy(adjacency_EE: Tensor) -> float:
    """Compute the entropy of the load over its maximum, log E: 1 for an even load, 0 if one expert takes all tokens."""
    return normalized_entropy(load(adjacency_EE))


def off_diagonal_mass(adjacency_EE: Tensor) -> float:
    """Compute the share of the graph's mass between different experts, which is what smoothing takes from neighbours.

    It starts at 0 and tends to (K - 1) / K, since a token with K experts adds K * K pairs, K of them of an expert with
    itself. The distance from that limit tells how far the moving average has come.
    """
    adjacency_EE = checked_graph(adjacency_EE)
    return 1.0 - float(adjacency_EE.trace() / adjacency_EE.sum())


def spectral_gap(adjacency_EE: Tensor) -> float:
    """Compute 1 minus the second largest eigenvalue of the row-stochastic transition matrix D^-1 A.

    It is 0 for a graph in two or more parts (an expert never selected with another is a part of its own), and (K - 1) /
    K * E / (E - 1) for uniform random top-K selections. The larger it is, the faster repeated smoothing would blur the
    experts into one.

    Source: Chung, Spectral Graph Theory (1997), chapter 1. D^-1 A has the eigenvalues of the symmetric D^-1/2 A D^-1/2,
    to which it is similar.
    """
    symmetric_EE = transition_matrix(checked_graph(adjacency_EE), "symmetric")
    return 1.0 - float(torch.linalg.eigvalsh(symmetric_EE)[-2])


def coselection_lift(adjacency_EE: Tensor, num_iterations: int = 200) -> Tensor:
    """Compute how much more often two experts are selected together than their loads explain.

    A token's experts are distinct, so the expectation is not load_j * load_k, by which even unrelated experts would
    seem to avoid each other. It is quasi-independence: expected_jk = u_j u_k off the diagonal and 0 on it, with u such
    that every expert has as many pairs as in the graph. It is found by at most `num_iterations` of iterative
    proportional fitting; far fewer are needed unless one expert is in nearly every pair.

    Returns:
        adjacency_jk / expected_jk, float64. It is 1 where the loads explain a pair, on the diagonal, and for an expert
        that was never selected with another. Shape: (num_experts, num_experts).

    Source: Goodman, "The Analysis of Cross-Classified Data: Independence, Quasi-Independence, and Interactions in
    Contingency Tables with or without Missing Entries" (1968).
    """
    pairs_EE = checked_graph(adjacency_EE).clone().fill_diagonal_(0.0)
    pairs_E = pairs_EE.sum(1)
    u_E = pairs_E.sqrt()
    for _ in range(num_iterations):
        # The geometric mean of the old u and the one that would fit this row: a plain step oscillates.
        others_E = u_E.sum() - u_E
        u_E = torch.where(pairs_E > 0, (u_E * pairs_E / others_E).sqrt(), 0.0)
    expected_EE = (u_E.unsqueeze(1) * u_E).fill_diagonal_(0.0)
    return torch.where(expected_EE > 0, pairs_EE / expected_EE, 1.0)


def cluster_order(adjacency_EE: Tensor) -> list[int]:
    """Order experts so that those selected together are next to each other, for heat maps.

    Average linkage on the distance 1 / (1 + lift), then the leaf order with the closest neighbours. It uses lift,
    because similarities that grow with load (cosine, Ochiai) order experts by popularity where communities are weak.

    Source: Bar-Joseph et al., "Fast optimal leaf ordering for hierarchical clustering" (2001).
    """
    return leaf_order(1.0 / (1.0 + coselection_lift(adjacency_EE).numpy()))


def leaf_order(distance_EE: np.ndarray) -> list[int]:
    """Order experts by distance: optimal leaf order of average linkage. Distances are symmetric up to rounding."""
    distance_EE = distance_EE.copy()
    np.fill_diagonal(distance_EE, 0.0)
    # Unchecked, because rounding breaks the symmetry that `squareform` checks; it reads the upper triangle.
    condensed = squareform(distance_EE, checks=False)
    return hierarchy.leaves_list(hierarchy.linkage(condensed, "average", optimal_ordering=True)).tolist()


SEED = 0
"""Default seed of the community search."""


def _as_network(adjacency_EE: Tensor) -> nx.Graph:
    """Return the network without self-loops, which are loads."""
    weights_EE = checked_graph(adjacency_EE).clone().fill_diagonal_(0.0)
    return nx.from_numpy_array(weights_EE.numpy())


def communities(adjacency_EE: Tensor, seed: int = SEED) -> list[list[int]]:
    """Find groups of experts that are selected with one another more than with the rest.

    The groups are a partition, the largest first. An expert never selected with another is a group. `seed` is that of
    the order in which experts are moved.

    Source: Blondel et al., "Fast unfolding of communities in large networks" (2008), by networkx.
    """
    network = _as_network(adjacency_EE)
    if not network.size():
        return [[expert] for expert in network]
    found = nx.community.louvain_communities(network, weight="weight", seed=seed)
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


def modularity(adjacency_EE: Tensor, groups: Sequence[Sequence[int]] | None = None) -> float:
    """Compute the share of the graph's weight within groups (`communities` if None), minus its expectation by chance.

    Q = sum over groups of w_in / w - (degree / 2w)^2, with w the weight of all edges between different experts, w_in of
    those within the group, and degree the sum of its experts' edges. Q is below 1, and 0 for a single group and for a
    graph without edges. The expectation includes pairs of an expert with itself, so unrelated experts score slightly
    below 0, and the best groups of them above.

    Source: Newman, "Modularity and community structure in networks" (2006), by networkx.
    """
    network = _as_network(adjacency_EE)
    if not network.size(weight="weight"):
        return 0.0
    return float(nx.community.modularity(network, groups or communities(adjacency_EE), weight="weight"))


def centrality(adjacency_EE: Tensor, damping: float = 0.85) -> Tensor:
    """Compute the PageRank of each expert: the share of time that a random walk on the graph spends there, float64.

    Unlike the leading eigenvector, it is also defined for graphs of several parts. `damping` is the share of steps
    along the graph; the others jump anywhere.

    Source: Brin and Page, "The Anatomy of a Large-Scale Hypertextual Web Search Engine" (1998), by networkx.
    """
    network = _as_network(adjacency_EE)
    ranks = nx.pagerank(network, alpha=damping, weight="weight", tol=1e-10, max_iter=1000)
    return torch.tensor([ranks[expert] for expert in range(len(adjacency_EE))], dtype=torch.float64)


def drift(before_EE: Tensor, after_EE: Tensor) -> float:
    """Compute the relative change of a graph, |after - before| / |after|, in the Frobenius norm."""
    before_EE, after_EE = checked_graph(before_EE, len(after_EE)), checked_graph(after_EE)
    return float((after_EE - before_EE).norm() / after_EE.norm())


def graph_summary(graphs: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Summarize a model's graphs, given by router, as means over its routers.

    Returns:
        `load_entropy`: normalized entropy of the load, 1 for an even load. `dead_experts`: share of experts with less
        than a tenth of the even load. `busiest`: highest load over the even load. `neighbours`: share of the graph's
        mass between different experts, which starts at 0 and tends to (K - 1) / K. `drift`: relative change of the
        graphs since `before` in the Frobenius norm, 0 without `before`.
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
