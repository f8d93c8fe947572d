"""The choice of experts to cluster or drop, against brute force and by hand."""

import itertools
import math

import pytest
import torch

from symphony_hf.conversion.compression.graphs import centrality, graph_distance
from symphony_hf.conversion.compression.merge import cluster_experts
from symphony_hf.conversion.compression.prune import highest


def mean_distance(distance, first, second):
    return sum(float(distance[i, j]) for i in first for j in second) / (len(first) * len(second))


def naive_clusters(distance, wanted):
    clusters = [[number] for number in range(len(distance))]
    while len(clusters) > wanted:
        pairs = itertools.combinations(clusters, 2)
        nearest = min((mean_distance(distance, *pair), pair) for pair in pairs)[1]
        clusters = [own for own in clusters if own not in nearest] + [sorted(nearest[0] + nearest[1])]
    return sorted(clusters)


def random_distance(number, seed):
    points = torch.randn(number, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
def test_clusters_of_four_experts_are_those_of_brute_force(wanted, seed):
    distance = random_distance(4, seed)
    assert cluster_experts(distance, wanted) == naive_clusters(distance, wanted)


def test_clusters_of_many_experts_are_those_of_brute_force():
    distance = random_distance(12, 7)
    assert cluster_experts(distance, 5) == naive_clusters(distance, 5)


def test_clusters_stay_within_a_routers_groups():
    distance = random_distance(8, 3)
    found = cluster_experts(distance, 4, num_groups=2)
    expected = naive_clusters(distance[:4, :4], 2)
    expected += [[4 + member for member in own] for own in naive_clusters(distance[4:, 4:], 2)]
    assert found == expected


def test_equal_distances_still_make_as_many_clusters_as_wanted():
    found = cluster_experts(torch.ones(6, 6).fill_diagonal_(0), 4)
    assert len(found) == 4
    assert sorted(member for own in found for member in own) == list(range(6))


def test_the_centre_of_a_star_by_hand():
    """Eigenvector of a star of three: the centre 1 / sqrt(2), each end 1 / sqrt(6); loads do not matter."""
    star = torch.diag(torch.tensor([0.1, 0.9, 0.5, 0.3]))
    star[0, 1:] = star[1:, 0] = 0.05
    expected = [1 / math.sqrt(2), *[1 / math.sqrt(6)] * 3]
    torch.testing.assert_close(centrality(star), torch.tensor(expected, dtype=torch.float64))


def test_the_distance_of_experts_that_meet_by_chance_is_a_half():
    even = torch.full((4, 4), 0.1)
    even.fill_diagonal_(0.3)
    expected = torch.full((4, 4), 0.5, dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(graph_distance(even), expected)


def test_experts_that_meet_often_are_near():
    graph = torch.full((4, 4), 0.01).fill_diagonal_(0.5)
    graph[0, 1] = graph[1, 0] = graph[2, 3] = graph[3, 2] = 0.4
    assert cluster_experts(graph_distance(graph), 2) == [[0, 1], [2, 3]]


def test_the_highest_scores_in_order():
    score = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, 0.0])
    assert highest(score, 3) == [0, 2, 4]  # of the two equal ones the first
    assert highest(score, 2, num_groups=2) == [0, 4]
    assert highest(score, 6) == list(range(6))
