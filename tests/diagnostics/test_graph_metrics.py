"""Each metric of a co-selection graph, on graphs small enough to compute by hand."""

import math

import pytest
import torch

from symphony_hf.diagnostics.graph_metrics import (
    cluster_order,
    coselection_lift,
    load,
    load_entropy,
    off_diagonal_mass,
    spectral_gap,
)
from symphony_hf.errors import GraphError
from symphony_hf.routing.graph import count_coselections, initial_adjacency

METRICS = [cluster_order, coselection_lift, load, load_entropy, off_diagonal_mass, spectral_gap]


def even_graph(num_experts, top_k):
    """Every set of K experts equally often: load K / E, pairs K (K - 1) / (E (E - 1))."""
    pair = top_k * (top_k - 1) / (num_experts * (num_experts - 1))
    adjacency = torch.full((num_experts, num_experts), pair)
    return adjacency.fill_diagonal_(top_k / num_experts)


def communities(num_experts, num_groups, strength):
    """Top-2 choices of 20,000 tokens, each with a leaning to one group of experts; loads are uneven."""
    group = torch.randperm(num_experts) % num_groups
    topic = torch.randint(num_groups, (20_000, 1))
    logits = torch.randn(20_000, num_experts) + 0.6 * torch.randn(num_experts) + strength * (group == topic)
    return count_coselections(logits.topk(2).indices, num_experts) / 20_000, group


@pytest.fixture
def pairs():
    """0 is only ever chosen with 2, 1 only with 3; the second pair three times as often."""
    adjacency = torch.zeros(4, 4)
    adjacency[[0, 2, 0, 2], [0, 2, 2, 0]] = 0.25
    adjacency[[1, 3, 1, 3], [1, 3, 3, 1]] = 0.75
    return adjacency


@pytest.fixture
def uneven():
    """Three experts, top-2: the pairs 01, 02 and 12 on 0.5, 0.3 and 0.2 of the tokens."""
    return torch.tensor([[0.8, 0.5, 0.3], [0.5, 0.7, 0.2], [0.3, 0.2, 0.5]])


def test_load_is_the_share_of_choices(uneven):
    torch.testing.assert_close(load(uneven), torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64))


def test_load_entropy_is_one_when_even_and_zero_for_one_expert(uneven):
    assert load_entropy(even_graph(8, 2)) == pytest.approx(1)
    assert load_entropy(torch.diag(torch.tensor([1.0, 0.0, 0.0]))) == 0
    by_hand = -(0.4 * math.log(0.4) + 0.35 * math.log(0.35) + 0.25 * math.log(0.25)) / math.log(3)
    assert load_entropy(uneven) == pytest.approx(by_hand)


def test_off_diagonal_mass_goes_from_zero_to_its_limit(uneven):
    assert off_diagonal_mass(initial_adjacency(8, 2)) == 0
    assert off_diagonal_mass(uneven) == pytest.approx(1 / 2)
    assert off_diagonal_mass(even_graph(8, 4)) == pytest.approx(3 / 4)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (16, 2), (64, 8)])
def test_spectral_gap_of_unrelated_choices(num_experts, top_k):
    gap = spectral_gap(even_graph(num_experts, top_k))
    assert gap == pytest.approx((top_k - 1) / top_k * num_experts / (num_experts - 1), abs=1e-6)


def test_spectral_gap_by_the_eigenvalues_of_the_transition_matrix_itself(uneven):
    transition = uneven / uneven.sum(1, keepdim=True)
    eigenvalues = sorted(torch.linalg.eigvals(transition.double()).real.tolist())
    assert spectral_gap(uneven) == pytest.approx(1 - eigenvalues[-2])


def test_spectral_gap_is_zero_in_parts(pairs):
    assert spectral_gap(pairs) == pytest.approx(0, abs=1e-9)
    assert spectral_gap(initial_adjacency(4, 2)) == pytest.approx(0, abs=1e-9)
    lonely = torch.zeros(4, 4)
    lonely[:3, :3] = even_graph(3, 2)
    assert spectral_gap(lonely) == pytest.approx(0, abs=1e-9)


def test_lift_of_unrelated_choices_is_one():
    torch.testing.assert_close(coselection_lift(even_graph(16, 4)), torch.ones(16, 16, dtype=torch.float64))
    torch.testing.assert_close(coselection_lift(initial_adjacency(4, 2)), torch.ones(4, 4, dtype=torch.float64))


def test_lift_of_two_even_pairs(pairs):
    """At even load each of three partners would get a third; the one true partner gets all: three times as much."""
    even = (pairs > 0).float()
    by_hand = torch.tensor([[1, 0, 3, 0], [0, 1, 0, 3], [3, 0, 1, 0], [0, 3, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(coselection_lift(even), by_hand)


def test_lift_of_three_experts_is_one_because_their_loads_fix_their_pairs(uneven):
    torch.testing.assert_close(coselection_lift(uneven), torch.ones(3, 3, dtype=torch.float64))


def test_lift_expects_as_many_pairs_of_each_expert_as_there_are():
    adjacency, _ = communities(12, 3, strength=1.0)
    observed = adjacency.double().fill_diagonal_(0)
    expected = observed / coselection_lift(adjacency)
    torch.testing.assert_close(expected.sum(1), observed.sum(1))


def test_cluster_order_puts_pairs_side_by_side(pairs):
    order = cluster_order(pairs)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_cluster_order_finds_communities_despite_uneven_loads():
    """A cosine or Ochiai similarity would leave half of these neighbours apart: it orders by popularity."""
    adjacency, group = communities(16, 4, strength=0.8)
    ordered = group[cluster_order(adjacency)]
    assert int((ordered[1:] != ordered[:-1]).sum()) == 3


@pytest.mark.parametrize("metric", [load_entropy, off_diagonal_mass, spectral_gap])
def test_numbers_do_not_depend_on_how_experts_are_numbered(metric, uneven):
    order = torch.tensor([2, 0, 1])
    assert metric(uneven[order][:, order]) == pytest.approx(metric(uneven))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("adjacency", "message"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(1, 1), r"at least 2.*\(1, 1\)"),
        (torch.ones(2, 3), r"\(2, 3\)"),
        (torch.tensor([[1.0, -0.1], [-0.1, 1.0]]), "2 negative"),
        (torch.tensor([[1.0, 0.5], [0.2, 1.0]]), "not symmetric"),
        (torch.full((2, 2), torch.nan), "4 non-finite"),
        (torch.zeros(2, 2), "no load"),
    ],
)
def test_invalid_graphs_are_refused(metric, adjacency, message):
    with pytest.raises(GraphError, match=message):
        metric(adjacency)


@pytest.mark.parametrize("metric", METRICS)
def test_a_graph_is_left_as_it_was(metric, uneven):
    before = uneven.clone()
    metric(uneven.requires_grad_())
    assert torch.equal(uneven, before)
