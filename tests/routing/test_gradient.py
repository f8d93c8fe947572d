"""Which experts take part in the router's gradient, and with what weights."""

import pytest
import torch

from symphony_hf.routing.gradient import Weighting, all_others, mixture_weights, nearest_others, random_others


def make_chosen(tokens=5, num_experts=8, top_k=3):
    return torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)])


def test_all_others_are_those_that_were_not_chosen():
    chosen_TK = make_chosen()
    for chosen, others in zip(chosen_TK.tolist(), all_others(chosen_TK, 8).tolist(), strict=True):
        assert others == [e for e in range(8) if e not in chosen]
    assert all_others(make_chosen(5, 3, 3), 3).shape == (5, 0)


def test_neighbours_have_the_largest_sums_over_the_chosen():
    chosen_TK, transition_EE = make_chosen(), torch.rand(8, 8)
    for chosen, others in zip(chosen_TK.tolist(), nearest_others(chosen_TK, transition_EE, 2).tolist(), strict=True):
        rest = [e for e in range(8) if e not in chosen]
        sums = {e: sum(float(transition_EE[i, e]) for i in chosen) for e in rest}
        assert others == sorted(rest, key=lambda e: -sums[e])[:2]


def test_experts_that_the_graph_gives_nothing_are_no_neighbours():
    transition_EE = torch.eye(4)
    assert nearest_others(torch.tensor([[0], [1]]), transition_EE, 2).tolist() == [[-1, -1], [-1, -1]]
    transition_EE[0, 3], transition_EE[1, 3] = 0.5, -0.5
    assert nearest_others(torch.tensor([[0], [1]]), transition_EE, 2).tolist() == [[3, -1], [-1, -1]]


def test_random_others_are_distinct_and_not_chosen():
    chosen_TK = make_chosen(tokens=200)
    others_TN = random_others(chosen_TK, 8, 5, torch.Generator().manual_seed(0))
    both = torch.cat([chosen_TK, others_TN], dim=1).sort(dim=1).values
    assert both.tolist() == [list(range(8))] * 200
    drawn = random_others(torch.zeros(3000, 1).long(), 4, 1).flatten().bincount(minlength=4)
    assert drawn[0] == 0
    assert drawn[1:].min() > 850  # 1000 each, 26 the standard deviation


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalized", [True, False])
def test_chosen_experts_keep_their_weights_and_absent_ones_have_none(scoring_func, renormalized):
    logits_TE, chosen_TK = torch.randn(5, 8, dtype=torch.float64).requires_grad_(), make_chosen()
    scores_TE = logits_TE.softmax(-1) if scoring_func == "softmax" else logits_TE.sigmoid()
    weights_TK = 2.5 * scores_TE.gather(1, chosen_TK)
    if renormalized:
        weights_TK = weights_TK / scores_TE.gather(1, chosen_TK).sum(1, keepdim=True)
    others_TN = all_others(chosen_TK, 8)[:, :2]
    others_TN[:, 1] = -1
    weighting = Weighting(scoring_func, renormalized)
    ours_TK, ours_TN = mixture_weights(logits_TE, weights_TK, chosen_TK, others_TN, weighting)
    torch.testing.assert_close(ours_TK, weights_TK)
    assert (ours_TN[:, 1] == 0).all()
    # An expert weighs as much as one of the chosen with its score would.
    factor_T = weights_TK[:, 0] / scores_TE.gather(1, chosen_TK[:, :1])[:, 0]
    torch.testing.assert_close(ours_TN[:, 0], factor_T * scores_TE.gather(1, others_TN[:, :1])[:, 0])
    # Without others, the gradient is the stock one.
    none_TN, upstream_TK = torch.full((5, 2), -1), torch.randn(5, 3, dtype=torch.float64)
    alone_TK, _ = mixture_weights(logits_TE, weights_TK, chosen_TK, none_TN, weighting)
    ours, stock = (
        torch.autograd.grad((w * upstream_TK).sum(), logits_TE, retain_graph=True)[0] for w in (alone_TK, weights_TK)
    )
    torch.testing.assert_close(ours, stock)
