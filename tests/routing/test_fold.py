"""A folded router gives the smoothed logits of the one that it replaces."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symphony_hf.routing.smoothing import fold_linear, smooth_logits, smooth_weight

from . import naive


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@naive.many
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 10**6))
def test_folded_router_gives_the_smoothed_logits(with_bias, num_experts, hidden_size, seed):
    x, weight = normal(5, hidden_size, seed=seed), normal(num_experts, hidden_size, seed=seed + 1)
    bias = normal(num_experts, seed=seed + 2) if with_bias else None
    matrix = naive.random_stochastic(num_experts, seed)
    folded_weight, folded_bias = fold_linear(weight, bias, matrix)
    assert (folded_bias is None) == (bias is None)
    folded = torch.nn.functional.linear(x, folded_weight, folded_bias)

    plain = naive.smooth(x.tolist(), weight.tolist())  # a linear layer is the same double loop
    size = naive.smooth([[abs(value) for value in row] for row in x.tolist()], weight.abs().tolist())
    if with_bias:
        plain = [[g + b for g, b in zip(row, bias.tolist(), strict=True)] for row in plain]
        size = [[g + abs(b) for g, b in zip(row, bias.tolist(), strict=True)] for row in size]
    expected = torch.tensor(naive.smooth(plain, matrix.tolist())).double()
    # Sums of E and then of D + 1 terms, so as many roundings of the sum of the terms' absolute values, twice to be
    # safe.
    terms = torch.tensor(naive.smooth(size, matrix.tolist())).double()
    bound = 2 * (num_experts + hidden_size + 1) * naive.EPS32 * terms
    assert ((folded.double() - expected).abs() <= bound).all()


def test_folding_loses_nothing_of_the_weight_used_at_run_time():
    weight, bias, matrix = normal(7, 9, dtype=torch.bfloat16), normal(7), naive.random_stochastic(7)
    folded_weight, folded_bias = fold_linear(weight, bias, matrix)
    naive.assert_same_bits(folded_weight, smooth_weight(weight, matrix))
    naive.assert_same_bits(folded_bias, smooth_weight(bias, matrix))


def test_fold_smooths_the_bias_with_the_weight():
    """Left as it was, the bias would be added after the graph, and the logits would differ."""
    x, weight, bias, matrix = normal(5, 9), normal(7, 9), normal(7, seed=1), naive.random_stochastic(7)
    folded = torch.nn.functional.linear(x, *fold_linear(weight, bias, matrix))
    expected = smooth_logits(torch.nn.functional.linear(x, weight, bias), matrix)
    naive.assert_near(folded, expected.tolist(), rtol=0, atol=2 * 17 * naive.EPS32 * 30)  # terms of 30 in all
    naive.assert_near(
        folded - x @ fold_linear(weight, None, matrix)[0].T,
        [smooth_weight(bias, matrix).tolist()] * 5,
        rtol=0,
        atol=2 * 17 * naive.EPS32 * 30,
    )


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, None])
def test_types_and_shapes_are_kept_and_the_identity_keeps_the_bits(weight_dtype, bias_dtype):
    weight = normal(60, 33, dtype=weight_dtype)
    bias = None if bias_dtype is None else normal(60, dtype=bias_dtype)
    folded_weight, folded_bias = fold_linear(weight, bias, torch.eye(60))
    naive.assert_same_bits(folded_weight, weight)
    if bias is None:
        assert folded_bias is None
    else:
        naive.assert_same_bits(folded_bias, bias)


@pytest.mark.parametrize("bias_size", [7, None])
def test_other_number_of_experts_is_refused_with_both(bias_size):
    with pytest.raises(ValueError) as refused:
        fold_linear(normal(7, 3), None if bias_size is None else normal(bias_size), torch.eye(5))
    assert {"7", "5"} <= set(re.findall(r"\d+", str(refused.value)))


def test_bias_of_another_number_of_experts_is_refused_with_both():
    with pytest.raises(ValueError) as refused:
        fold_linear(normal(5, 3), normal(7), torch.eye(5))
    assert {"7", "5"} <= set(re.findall(r"\d+", str(refused.value)))
