"""Each number of a routing on a case computed by hand."""

import math

import pytest
import torch

from symphony_hf.diagnostics.routing_metrics import (
    coactivation,
    dead_experts,
    domain_allocation,
    domain_information,
    flip_rate,
    load_of_choices,
    normalized_entropy,
    router_margin,
    router_saturation,
)
from symphony_hf.errors import EvaluationError

# Four tokens, two of four experts each.
CHOSEN = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])


def test_the_load_of_choices():
    assert load_of_choices(CHOSEN, 4).tolist() == [4 / 8, 3 / 8, 1 / 8, 0.0]
    assert load_of_choices(CHOSEN.short(), 4).dtype == torch.float64
    with pytest.raises(EvaluationError, match="no tokens"):
        load_of_choices(CHOSEN[:0], 4)


def test_the_entropy_of_a_load():
    assert normalized_entropy(torch.full((8,), 1 / 8)) == pytest.approx(1.0)
    assert normalized_entropy(torch.tensor([1.0, 0.0, 0.0])) == 0.0
    assert normalized_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)  # log 2 / log 4


def test_dead_experts_have_less_than_a_tenth_of_the_even_load():
    load = torch.tensor([0.024, 0.026, 0.0, 0.95], dtype=torch.float64)  # a tenth of 1/4 is 0.025
    assert dead_experts(load) == [0, 2]
    assert dead_experts(load, threshold=0.0) == []


def test_the_margin_is_the_gap_behind_the_last_one_chosen():
    logits = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 2.0, 5.0]])
    chosen = torch.tensor([[0, 1], [3, 2]])
    assert router_margin(logits, chosen).tolist() == [0.5, 0.0]


def test_the_margin_is_negative_where_something_else_than_the_logits_chose():
    logits = torch.tensor([[3.0, 1.0, 0.5, -1.0]])
    assert router_margin(logits, torch.tensor([[0, 3]])).tolist() == [-2.0]
    assert router_margin(logits, torch.tensor([[0, 1, 2, 3]])).tolist() == [math.inf]


def test_flip_rate_and_saturation_of_each_token():
    after = torch.tensor([[1, 0], [1, 2], [3, 1], [0, 1]])
    assert flip_rate(CHOSEN, after).tolist() == [0.0, 0.5, 1.0, 0.0]
    assert flip_rate(CHOSEN, after).mean() == 3 / 8
    assert flip_rate(CHOSEN, CHOSEN.flip(1)).mean() == 0.0
    assert router_saturation(after, CHOSEN) == 5 / 8


def test_saturation_by_olmoes_formula():
    """1/N sum_i |E_i(t) & E_i(T)| / k, by sets."""
    early, final = (torch.rand(50, 8).topk(3).indices for _ in range(2))
    pairs = zip(early.tolist(), final.tolist(), strict=True)
    assert router_saturation(early, final) == pytest.approx(sum(len({*a} & {*b}) / 3 for a, b in pairs) / 50)


def test_coactivation_is_conditional_on_the_row():
    wanted = [[1, 3 / 4, 1 / 4, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert coactivation(CHOSEN, 4).tolist() == wanted


def test_the_allocation_of_domains():
    allocation = domain_allocation([CHOSEN[:2], CHOSEN[2:]], 4)
    assert allocation.tolist() == [[1.0, 1.0, 0.0, 0.0], [1.0, 0.5, 0.5, 0.0]]
    with pytest.raises(EvaluationError, match="no tokens"):
        domain_allocation([CHOSEN, CHOSEN[:0]], 4)


def test_what_the_experts_tell_about_the_domain():
    apart = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    assert domain_information(apart) == pytest.approx(1.0)
    assert domain_information(apart[[0, 0]]) == 0.0
    assert domain_information(apart[:1]) == 0.0
    # Half of the second domain is where the first is: H((3/4, 1/4)) - H((1/2, 1/2)) / 2, over log 2.
    half = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert domain_information(half) == pytest.approx((mixed - math.log(2) / 2) / math.log(2))
