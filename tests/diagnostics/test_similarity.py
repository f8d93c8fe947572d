"""Linear CKA against its definition, by hand and by loops."""

import itertools

import pytest
import torch

from symphony_hf.diagnostics.routing_metrics import cka_matrix
from symphony_hf.errors import EvaluationError


def cka(first, second, unbiased=False):
    return float(cka_matrix([first, second], unbiased)[0, 1])


def test_two_features_by_hand():
    """Centered columns (1, 1, -1, -1) and (1, -1, 1, -1): X'X is diagonal, and each Y has one of them."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    # ||Y'X||^2 = 16, ||X'X|| = sqrt(32), ||Y'Y|| = 4.
    assert cka(x, x[:, :1]) == pytest.approx(16 / (32**0.5 * 4))
    assert cka(x[:, :1], x[:, 1:]) == pytest.approx(0.0, abs=1e-12)
    assert cka(x, x[:, [1, 0]] * 3 + 5) == pytest.approx(1.0)


def test_an_output_that_is_not_finite_is_similar_to_nothing_known():
    x = torch.randn(6, 3)
    broken = x.clone()
    broken[0, 0] = float("inf")
    found = cka_matrix([x, broken, torch.ones(6, 3)])
    assert found[0, 1].isnan()
    assert found[0, 2] == 0  # of no variance


def test_the_definition_by_features():
    x, y = torch.randn(20, 3).double(), torch.randn(20, 5).double()
    y[:, 0] += x[:, 1]
    x0, y0 = x - x.mean(0), y - y.mean(0)
    wanted = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    assert cka(x, y) == pytest.approx(float(wanted))


def unbiased_hsic(k, l_):
    """The mean of h over all quadruples of different tokens, which the closed form sums up. Song et al., theorem 2."""
    total, number = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += float(k[i, j] * (l_[i, j] + l_[q, r] - 2 * l_[i, q]))
        number += 1
    return total / number


def test_the_unbiased_estimate_is_the_mean_over_quadruples():
    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    y += x
    k, l_ = x @ x.T, y @ y.T
    wanted = unbiased_hsic(k, l_) / (unbiased_hsic(k, k) * unbiased_hsic(l_, l_)) ** 0.5
    assert cka(x, y, unbiased=True) == pytest.approx(wanted)


def test_few_tokens_and_many_features_look_alike_only_with_bias():
    outputs = torch.randn(4, 32, 512)
    others = ~torch.eye(4, dtype=torch.bool)
    assert cka_matrix(outputs, unbiased=False)[others].min() > 0.85
    assert cka_matrix(outputs)[others].abs().max() < 0.2
    assert cka_matrix(outputs).diagonal().tolist() == [1.0] * 4


def test_constant_outputs_have_no_similarity():
    outputs = torch.stack([torch.ones(8, 3), torch.randn(8, 3)])
    for unbiased in (False, True):
        assert cka_matrix(outputs, unbiased).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_too_few_tokens_are_refused():
    with pytest.raises(EvaluationError, match=r"got \[3\]"):
        cka_matrix([torch.randn(3, 2), torch.randn(3, 2)])
    with pytest.raises(EvaluationError, match=r"got \[4, 5\]"):
        cka_matrix([torch.randn(4, 2), torch.randn(5, 2)])
