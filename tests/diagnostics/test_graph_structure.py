"""Communities, modularity, centrality and drift on graphs small enough to compute by hand."""

import pytest
import torch

from symphony_hf.diagnostics.graph_metrics import centrality, communities, drift, modularity
from symphony_hf.errors import GraphError
from symphony_hf.routing.graph import initial_adjacency


def graph(num_experts, edges, load=1.0):
    adjacency = torch.eye(num_experts) * load
    for j, k, weight in edges:
        adjacency[j, k] = adjacency[k, j] = weight
    return adjacency


PAIRS = graph(4, [(0, 2, 0.3), (1, 3, 0.3)])


def test_two_pairs_are_two_communities():
    assert communities(PAIRS) == [[0, 2], [1, 3]]
    assert modularity(PAIRS) == pytest.approx(0.5)  # each: half the weight, less (1/2)^2


def test_the_modularity_of_given_groups():
    assert modularity(PAIRS, [[0, 1, 2, 3]]) == pytest.approx(0.0)
    assert modularity(PAIRS, [[0, 1], [2, 3]]) == pytest.approx(-0.5)
    # 0-1 weighs 3, 1-2 weighs 1: with 2 alone, 3/4 - (7/8)^2 - (1/8)^2.
    path = graph(3, [(0, 1, 0.3), (1, 2, 0.1)])
    assert modularity(path, [[0, 1], [2]]) == pytest.approx(3 / 4 - 49 / 64 - 1 / 64)


def test_self_loops_do_not_affect_modularity():
    assert modularity(graph(4, [(0, 2, 0.3), (1, 3, 0.3)], load=5.0)) == pytest.approx(0.5)


def test_before_training_everyone_is_alone():
    start = initial_adjacency(3, 1)
    assert communities(start) == [[0], [1], [2]]
    assert modularity(start) == 0.0
    assert centrality(start).tolist() == pytest.approx([1 / 3] * 3)


def test_the_center_of_a_star():
    """h = 0.15/4 + 0.85 * 3 l and l = 0.15/4 + 0.85 h / 3."""
    hub = (0.0375 + 0.85 * 3 * 0.0375) / (1 - 0.85**2)
    leaf = 0.0375 + 0.85 * hub / 3
    ranks = centrality(graph(4, [(0, 1, 0.2), (0, 2, 0.2), (0, 3, 0.2)]))
    assert ranks.tolist() == pytest.approx([hub, leaf, leaf, leaf], abs=1e-8)


def test_drift_is_relative_to_the_later_graph():
    assert drift(torch.eye(3), 2 * torch.eye(3)) == pytest.approx(0.5)
    assert drift(PAIRS, PAIRS) == 0.0
    # (0.1, 0.1) of a norm of sqrt(4 + 2 * 0.16 + 2 * 0.09).
    moved = graph(4, [(0, 2, 0.4), (1, 3, 0.3)])
    assert drift(PAIRS, moved) == pytest.approx((2 * 0.01) ** 0.5 / 4.5**0.5, rel=1e-6)


@pytest.mark.parametrize("metric", [communities, modularity, centrality, lambda a: drift(a, a)])
def test_invalid_graphs_are_refused(metric):
    with pytest.raises(GraphError, match="not symmetric"):
        metric(torch.tensor([[1.0, 0.5], [0.2, 1.0]]))


def test_graphs_of_different_sizes_do_not_drift():
    with pytest.raises(GraphError, match=r"shape \(3, 3\) instead of \(4, 4\)"):
        drift(torch.eye(3), PAIRS)
