"""The graph on logits, on weights and on probabilities, against loops; at the identity, to the bit."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symphony_hf.routing.graph import (
    count_coselections,
    initial_adjacency,
    mix_with_identity,
    transition_matrix,
    update_adjacency,
)
from symphony_hf.routing.smoothing import (
    smooth_logits,
    smooth_probabilities,
    smooth_scores,
    smooth_sigmoid_scores,
    smooth_weight,
)

from . import naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
# Half of the distance between neighbouring numbers, relative: one rounding to each type.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DENORMAL = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}  # the least of each type

# Tokens, experts, and the seed of their numbers.
sizes = st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(0, 10**6))


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def dot_bound(terms, size):
    """How far a float32 dot product of `size` terms may be off, whose absolute values add up to `terms`."""
    return 2 * size * naive.EPS32 * terms


def assert_within(actual, expected, bound):
    """Each entry within its own bound, which a reference computed for it."""
    expected, bound = torch.tensor(expected).double(), torch.tensor(bound).double()
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


def absolute(rows):
    return [[abs(value) for value in row] for row in rows]


# Logits


@naive.many
@given(sizes)
def test_smoothed_logits_are_those_of_the_double_loop(size):
    num_tokens, num_experts, seed = size
    logits = normal(num_tokens, num_experts, seed=seed, scale=3.0)
    matrix = naive.random_stochastic(num_experts, seed)
    smoothed = smooth_logits(logits, matrix)
    assert smoothed.dtype == torch.float32
    assert smoothed.shape == logits.shape
    if num_tokens:
        terms = naive.smooth(absolute(logits.tolist()), matrix.tolist())
        bound = [[dot_bound(value, num_experts) for value in row] for row in terms]
        assert_within(smoothed, naive.smooth(logits.tolist(), matrix.tolist()), bound)


@every_dtype
def test_smoothed_logits_of_every_type_are_float32(dtype):
    logits = normal(20, 6, scale=3.0, dtype=dtype)
    matrix = naive.random_stochastic(6)
    smoothed = smooth_logits(logits, matrix)
    assert smoothed.dtype == torch.float32
    # Logits of 12 at most, in 6 terms of weights that sum to 1: far below a rounding to bfloat16.
    naive.assert_near(smoothed, naive.smooth(logits.tolist(), matrix.tolist()), rtol=0, atol=dot_bound(12.0, 6))


@every_dtype
@pytest.mark.parametrize("num_experts", [1, 7, 60, 128])
def test_identity_keeps_logits_to_the_bit(num_experts, dtype):
    logits = normal(33, num_experts, scale=5.0, dtype=dtype)
    naive.assert_same_bits(smooth_logits(logits, torch.eye(num_experts)), logits.float())


@naive.few
@given(sizes, st.randoms(use_true_random=False))
def test_permuting_the_experts_permutes_the_smoothed_logits(size, random):
    num_tokens, num_experts, seed = size
    order = list(range(num_experts))
    random.shuffle(order)
    logits = normal(num_tokens, num_experts, seed=seed)
    matrix = transition_matrix(naive.random_graph(num_experts, seed))
    permuted = smooth_logits(
        logits[:, order], transition_matrix(naive.random_graph(num_experts, seed)[order][:, order])
    )
    # Logits of 6 at most; both sides round, the sums in another order, the matrix and the product each.
    bound = 4 * dot_bound(6.0, num_experts)
    naive.assert_near(permuted, smooth_logits(logits, matrix)[:, order], rtol=0, atol=bound)


@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("constant", [-7.0, 100.0])
def test_row_stochastic_matrix_passes_a_constant_on(self_loops, constant):
    """A constant on all logits of a token, which softmax ignores, stays one and changes no probability."""
    logits = normal(12, 7, scale=2.0)
    matrix = mix_with_identity(transition_matrix(naive.random_graph(7), "row", self_loops), 0.6)
    smoothed, shifted = smooth_logits(logits, matrix), smooth_logits(logits + constant, matrix)
    # Numbers up to 110, rounded in the sum, in each of 7 terms and in rows that sum to 1 only to 4 roundings.
    bound = dot_bound(110.0, 7)
    naive.assert_near(shifted, (smoothed.double() + constant).tolist(), rtol=0, atol=bound)
    # exp turns an absolute error of a logit into a relative one of a probability; the partition adds as much.
    naive.assert_near(shifted.softmax(-1), naive.softmax(smoothed.tolist()), rtol=3 * bound)


def test_symmetric_normalization_does_not_pass_a_constant_on():
    """The reason for `row` being the default; it also shows that the test above can fail."""
    logits = normal(12, 7)
    matrix = transition_matrix(naive.random_graph(7), "symmetric")
    moved = smooth_logits(logits + 10.0, matrix) - smooth_logits(logits, matrix)
    assert (moved - 10.0).abs().max() > 0.1


def test_from_tokens_to_smoothed_logits():
    """The whole way, for some updates, in loops on one side and in the package on the other."""
    num_experts, top_k, num_tokens, decay, strength = 7, 3, 25, 0.8, 0.7
    adjacency = initial_adjacency(num_experts, top_k)
    expected = [[top_k / num_experts * (j == k) for k in range(num_experts)] for j in range(num_experts)]
    for step in range(4):
        chosen = naive.choose(num_tokens, num_experts, top_k, seed=step)
        mask = [token % 5 != step for token in range(num_tokens)]
        counts = count_coselections(torch.tensor(chosen), num_experts, torch.tensor(mask))
        adjacency = update_adjacency(adjacency, counts, torch.tensor(sum(mask)), decay)
        expected = naive.moving_average(expected, naive.count(chosen, num_experts, mask), sum(mask), decay)
    logits = normal(9, num_experts, scale=2.0)
    for normalization in naive.NORMALIZATIONS:
        for self_loops in (True, False):
            matrix = mix_with_identity(transition_matrix(adjacency, normalization, self_loops), strength)
            loop = naive.mix(naive.transition(expected, normalization, self_loops), strength)
            # Some 40 roundings on the way, on sums of logits whose terms add up to 20 at most (K = 3 logits of 6).
            naive.assert_near(
                smooth_logits(logits, matrix), naive.smooth(logits.tolist(), loop), rtol=0, atol=40 * naive.EPS32 * 20
            )


# Weights


@naive.many
@given(sizes, st.integers(1, 12))
def test_smoothed_weight_gives_the_smoothed_logits(size, hidden_size):
    num_tokens, num_experts, seed = size
    x, weight = normal(num_tokens, hidden_size, seed=seed), normal(num_experts, hidden_size, seed=seed + 1)
    matrix = naive.random_stochastic(num_experts, seed)
    through_weight = x @ smooth_weight(weight, matrix).T
    through_logits = smooth_logits(x @ weight.T, matrix)
    if num_tokens:
        # In exact arithmetic they are equal. Each side is two dot products one after the other, of E and of D terms,
        # so each is off by at most (E + D) roundings of sum_kd |a_jk| |w_kd| |x_d|.
        inner = naive.smooth(absolute(x.tolist()), absolute(weight.tolist()))
        terms = naive.smooth(inner, matrix.tolist())
        bound = [[2 * dot_bound(value, num_experts + hidden_size) for value in row] for row in terms]
        assert_within(through_weight, through_logits.tolist(), bound)


@every_dtype
def test_smoothed_weight_is_rounded_once(dtype):
    weight, matrix = normal(6, 10, dtype=dtype), naive.random_stochastic(6)
    smoothed = smooth_weight(weight, matrix)
    assert smoothed.dtype == dtype
    transposed = weight.T.tolist()
    expected = torch.tensor(naive.smooth(transposed, matrix.tolist())).double().T
    # Float32 sums of 6 terms of 4 at most, then one rounding to the type: none in between, which would double it.
    bound = ROUNDING[dtype] * expected.abs() + dot_bound(4.0, 6)
    assert ((smoothed.double() - expected).abs() <= bound).all()


@every_dtype
@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (60, 33), (128, 64), (7,), (60,)])
def test_identity_keeps_a_weight_to_the_bit(shape, dtype):
    weight = normal(*shape, dtype=dtype)
    naive.assert_same_bits(smooth_weight(weight, torch.eye(shape[0])), weight)


@every_dtype
@pytest.mark.parametrize("name", ["tiny", "denormal", "max", "eps"])
@pytest.mark.parametrize("sign", [1, -1])
def test_identity_keeps_small_and_large_weights_to_the_bit(name, sign, dtype):
    value = sign * (DENORMAL[dtype] if name == "denormal" else getattr(torch.finfo(dtype), name))
    weight = torch.tensor([[value, 1.0 + value, -1.0], [0.0, value, 3.0], [0.5, 2.0, value]], dtype=dtype)
    assert torch.isfinite(weight).all()
    naive.assert_same_bits(smooth_weight(weight, torch.eye(3)), weight)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_identity_keeps_bits_where_matrix_products_may_be_rough(device, precision):
    """TF32 and bfloat16 round a product's inputs to 11, 8 bits; `Trainer(tf32=True)` asks for it, as do some CPUs."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = torch.get_float32_matmul_precision()
    weight, logits = normal(128, 256).to(device), normal(300, 128).to(device)
    identity, matrix = torch.eye(128, device=device), naive.random_stochastic(128).to(device)
    try:
        torch.set_float32_matmul_precision(precision)
        naive.assert_same_bits(smooth_weight(weight, identity), weight)
        naive.assert_same_bits(smooth_logits(logits, identity), logits)
        naive.assert_same_bits(smooth_scores(logits, identity), logits)
        smoothed = smooth_weight(weight, matrix)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = matrix.double() @ weight.double()
    # Both inputs of the product are rounded: weights of 5 at most, and A - I, whose rows have absolute sums below 2.
    rounding = {"high": 2**-11, "medium": 2**-8}[precision]
    naive.assert_near(smoothed.cpu(), expected.cpu(), rtol=0, atol=2 * rounding * 5.0)


def test_bias_is_smoothed_as_a_weight_of_one_column():
    bias, matrix = normal(7), naive.random_stochastic(7)
    smoothed = smooth_weight(bias, matrix)
    assert smoothed.shape == (7,)
    expected = naive.smooth([bias.tolist()], matrix.tolist())[0]
    naive.assert_near(smoothed, expected, rtol=0, atol=dot_bound(4.0, 7))


def test_gradient_of_the_smoothed_weight_reaches_weight_and_graph():
    weight, matrix = normal(4, 3).requires_grad_(), naive.random_stochastic(4).requires_grad_()
    outer = normal(4, 3, seed=1)
    (smooth_weight(weight, matrix) * outer).sum().backward()
    # d/dW_kd = sum_j outer_jd a_jk, d/da_jk = sum_d outer_jd w_kd; sums of 4 float32 terms of size 5.
    for k in range(4):
        for d in range(3):
            expected = sum(outer[j, d].item() * matrix[j, k].item() for j in range(4))
            assert math.isclose(weight.grad[k, d], expected, rel_tol=0, abs_tol=dot_bound(20.0, 4))
        for j in range(4):
            expected = sum(outer[j, d].item() * weight[k, d].item() for d in range(3))
            assert math.isclose(matrix.grad[j, k], expected, rel_tol=0, abs_tol=dot_bound(20.0, 4))


# Scores


def naive_scores(logits, matrix):
    """log(softmax(g) @ A) + logsumexp(g), token by token."""
    mixed = naive.spread(naive.softmax(logits), matrix)
    return [
        [math.log(p) + naive.logsumexp(token) for p in probabilities]
        for token, probabilities in zip(logits, mixed, strict=True)
    ]


@naive.many
@given(sizes)
def test_softmax_of_smoothed_scores_is_the_mixed_distribution(size):
    num_tokens, num_experts, seed = size
    logits = normal(num_tokens, num_experts, seed=seed, scale=3.0)
    matrix = naive.random_stochastic(num_experts, seed)
    smoothed = smooth_scores(logits, matrix)
    assert smoothed.dtype == torch.float32
    assert smoothed.shape == logits.shape
    if num_tokens:
        # Logits of 15 at most: a few roundings of them are an absolute error of 15 * 2**-22, which softmax makes a
        # relative one of a probability, twice (its own and the partition's).
        expected = naive.spread(naive.softmax(logits.tolist()), matrix.tolist())
        naive.assert_near(smoothed.softmax(-1), expected, rtol=2 * 15 * 2.0**-22)
        naive.assert_near(smoothed, naive_scores(logits.tolist(), matrix.tolist()), rtol=0, atol=15 * 2.0**-22)


def test_smoothed_scores_keep_the_partition():
    """Mixing keeps the sum of probabilities, so z-loss sees the router's own scale."""
    logits = normal(40, 7, scale=3.0) + 5.0
    smoothed = smooth_scores(logits, naive.random_stochastic(7))
    expected = [naive.logsumexp(token) for token in logits.tolist()]
    naive.assert_near(smoothed.logsumexp(-1), expected, rtol=0, atol=20 * 2.0**-22)  # roundings of numbers of 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smoothed_scores_of_half_types_are_rounded_once(dtype):
    logits, matrix = normal(30, 6, scale=2.0, dtype=dtype), naive.random_stochastic(6)
    smoothed = smooth_scores(logits, matrix)
    assert smoothed.dtype == dtype
    expected = torch.tensor(naive_scores(logits.tolist(), matrix.tolist())).double()
    bound = ROUNDING[dtype] * expected.abs() + 15 * 2.0**-22  # one rounding to the type, and float32's error above
    assert ((smoothed.double() - expected).abs() <= bound).all()


@every_dtype
@pytest.mark.parametrize("num_experts", [1, 2, 7, 60, 128])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 200.0])
def test_identity_keeps_scores_to_the_bit(num_experts, scale, dtype):
    logits = normal(50, num_experts, dtype=dtype).clamp(-1, 1) * scale
    naive.assert_same_bits(smooth_scores(logits, torch.eye(num_experts)), logits)


@every_dtype
def test_identity_keeps_extreme_scores_to_the_bit(dtype):
    logits = torch.tensor([[200.0, -200.0, 0.0], [-200.0, -200.0, -200.0], [200.0, 200.0, -0.0], [1e4, -1e4, 3e4]])
    logits = logits.to(dtype)
    naive.assert_same_bits(smooth_scores(logits, torch.eye(3)), logits)


@pytest.mark.parametrize("matrix", ["dense", "identity", "sparse", "neighbours only"])
def test_smoothed_scores_and_their_gradients_stay_finite_at_extreme_logits(matrix):
    matrix = {
        "dense": naive.random_stochastic(4),
        "identity": torch.eye(4),
        "sparse": transition_matrix(naive.random_graph(4, seed=2, silent={3})),
        "neighbours only": torch.eye(4)[[1, 0, 3, 2]],  # the probabilities of two pairs change places
    }[matrix].requires_grad_()
    logits = torch.tensor(
        [
            [200.0, -200.0, 0.0, 100.0],
            [-200.0, -200.0, -200.0, 200.0],
            [200.0, 200.0, 200.0, 200.0],
            [-200.0, 200.0, -200.0, -200.0],
            [0.0, 0.0, 0.0, 0.0],
        ]
    ).requires_grad_()
    smoothed = smooth_scores(logits, matrix)
    assert torch.isfinite(smoothed).all()
    expected = naive.spread(naive.softmax(logits.tolist()), matrix.tolist())
    # Logits of 200 are rounded by 200 * 2**-24; `atol` is for probabilities that float32 cannot hold.
    naive.assert_near(smoothed.softmax(-1), expected, rtol=8 * 200 * naive.EPS32, atol=1e-30)
    (smoothed.softmax(-1) * normal(5, 4)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(matrix.grad).all()
    smooth_scores(logits, matrix).logsumexp(-1).square().mean().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(matrix.grad).all()


def check_scores_gradient(logits, matrix):
    weight = normal(*logits.shape, seed=5).tolist()

    def weighted(rows, matrix_rows):
        scores = naive_scores(rows, matrix_rows)
        return sum(
            w * s for w_row, s_row in zip(weight, scores, strict=True) for w, s in zip(w_row, s_row, strict=True)
        )

    logits, matrix = logits.clone().requires_grad_(), matrix.clone().requires_grad_()
    (smooth_scores(logits, matrix) * torch.tensor(weight)).sum().backward()
    rows, matrix_rows = logits.tolist(), matrix.tolist()
    # The reference differentiates in double precision, off by about 1e-9; the gradients are sums of a dozen float32
    # terms of size 5.
    naive.assert_near(logits.grad, naive.slope(lambda moved: weighted(moved, matrix_rows), rows), rtol=0, atol=1e-5)
    naive.assert_near(matrix.grad, naive.slope(lambda moved: weighted(rows, moved), matrix_rows), rtol=0, atol=1e-4)


def test_gradient_of_smoothed_scores_is_that_of_finite_differences():
    check_scores_gradient(normal(3, 4), naive.random_stochastic(4))


def test_gradient_of_smoothed_scores_at_even_logits():
    """Even probabilities stay as they were under a doubly stochastic matrix; their gradient still mixes.

    A router that starts at zero, or one with even logits by chance, is there.
    """
    matrix = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125]] + 2 * [[0.125, 0.125, 0.375, 0.375]])
    check_scores_gradient(torch.zeros(2, 4), matrix)


def test_gradient_of_smoothed_scores_at_the_identity_reaches_the_graph():
    """Where every learned graph starts: no probability is moved yet, and the gradient says where to."""
    check_scores_gradient(normal(3, 4), torch.eye(4))


# Scores of a sigmoid


def naive_sigmoid(value):
    return 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))


def naive_sigmoids(logits, matrix, sign=1):
    """A's mean of the sigmoids; of their complements with sign -1."""
    return naive.smooth([[naive_sigmoid(sign * value) for value in token] for token in logits], matrix)


def naive_sigmoid_scores(logits, matrix):
    """The log-odds of A's mean, and of the complements' mean, which is 1 minus it where rows sum to 1."""
    up, down = naive_sigmoids(logits, matrix), naive_sigmoids(logits, matrix, -1)
    return [[math.log(p / q) for p, q in zip(*token, strict=True)] for token in zip(up, down, strict=True)]


@naive.many
@given(sizes, st.sampled_from([1.0, 5.0, 20.0]))
def test_sigmoid_of_smoothed_scores_is_the_mean_of_the_neighbours(size, scale):
    num_tokens, num_experts, seed = size
    logits = normal(num_tokens, num_experts, seed=seed, scale=scale)
    matrix = naive.random_stochastic(num_experts, seed)
    smoothed = smooth_sigmoid_scores(logits, matrix)
    assert smoothed.dtype == torch.float32
    assert smoothed.shape == logits.shape
    if num_tokens:
        # Some roundings of numbers below 1, in sums of up to 9, and of logarithms where they are steep.
        expected = naive_sigmoids(logits.tolist(), matrix.tolist())
        naive.assert_near(smoothed.double().sigmoid(), expected, rtol=0, atol=3e-7)


def test_sigmoid_scores_of_confident_logits_are_not_rough():
    """Of the sigmoid of 12, float32 has two digits left of what it lacks to 1, and of that of 17 none."""
    logits = torch.linspace(-30, 30, 400).reshape(40, 10)[:, torch.randperm(10, generator=torch.manual_seed(0))]
    for strength in (0.001, 0.1, 1.0):
        matrix = mix_with_identity(naive.random_stochastic(10), strength)
        expected = naive_sigmoids(logits.tolist(), matrix.tolist())
        # A sigmoid and its mean have some roundings of numbers below 1, as has the logarithm of what is near 1.
        naive.assert_near(smooth_sigmoid_scores(logits, matrix).double().sigmoid(), expected, rtol=0, atol=3e-7)
    even = torch.linspace(-80, 80, 33)[:, None].repeat(1, 10)
    # A mean of equal sigmoids is the sigmoid: logarithms of up to 80, and some roundings of what they are taken of.
    naive.assert_near(smooth_sigmoid_scores(even, naive.random_stochastic(10)), even.tolist(), rtol=0, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("num_experts", [1, 2, 7, 60, 128])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 12.0, 200.0])
def test_identity_keeps_sigmoid_scores_to_the_bit(num_experts, scale, dtype):
    logits = normal(50, num_experts, dtype=dtype).clamp(-1, 1) * scale
    naive.assert_same_bits(smooth_sigmoid_scores(logits, torch.eye(num_experts)), logits)


@every_dtype
def test_identity_keeps_extreme_sigmoid_scores_to_the_bit(dtype):
    logits = torch.tensor([[200.0, -200.0, 0.0], [-87.5, 88.0, -0.0], [1e4, -1e4, 3e4]]).to(dtype)
    naive.assert_same_bits(smooth_sigmoid_scores(logits, torch.eye(3)), logits)


@pytest.mark.parametrize("matrix", ["dense", "identity", "neighbours only"])
def test_smoothed_sigmoid_scores_and_their_gradients_stay_finite_at_extreme_logits(matrix):
    matrix = {
        "dense": naive.random_stochastic(4),
        "identity": torch.eye(4),
        "neighbours only": torch.eye(4)[[1, 0, 3, 2]],  # two pairs change places
    }[matrix].requires_grad_()
    logits = torch.tensor(
        [[200.0, -200.0, 0.0, 100.0], [-200.0, -200.0, -200.0, 200.0], [90.0, -90.0, 17.0, -17.0], [88.0, 0, 20, -88.0]]
    ).requires_grad_()
    smoothed = smooth_sigmoid_scores(logits, matrix)
    assert torch.isfinite(smoothed).all()
    expected = naive_sigmoids(logits.tolist(), matrix.tolist())
    naive.assert_near(smoothed.double().sigmoid(), expected, rtol=0, atol=3e-7)  # as above
    (smoothed.sigmoid() * normal(4, 4)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(matrix.grad).all()


@pytest.mark.parametrize("matrix", [naive.random_stochastic(4), torch.eye(4)], ids=["dense", "identity"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_gradient_of_smoothed_sigmoid_scores_is_that_of_finite_differences(matrix, scale):
    logits, weight = normal(3, 4, scale=scale).requires_grad_(), normal(3, 4, seed=5)
    matrix = matrix.clone().requires_grad_()

    def weighted(rows, matrix_rows):
        return (torch.tensor(naive_sigmoid_scores(rows, matrix_rows), dtype=torch.float64) * weight).sum().item()

    (smooth_sigmoid_scores(logits, matrix) * weight).sum().backward()
    rows, matrix_rows = logits.tolist(), matrix.tolist()
    numeric = (naive.slope(lambda moved: weighted(moved, matrix_rows), rows), logits.grad)
    of_matrix = (naive.slope(lambda moved: weighted(rows, moved), matrix_rows), matrix.grad)
    for expected, gradient in (numeric, of_matrix):
        # Entries of up to some hundreds, where a sigmoid is far below its neighbours', of a dozen float32 terms each.
        naive.assert_near(gradient, expected, rtol=1e-5, atol=1e-4)


@naive.many
@given(sizes)
def test_smoothed_probabilities_are_those_of_a_loop_and_sum_to_one(size):
    num_tokens, num_experts, seed = size
    probabilities = normal(num_tokens, num_experts, seed=seed).softmax(-1)
    matrix = naive.random_stochastic(num_experts, seed)
    mixed = smooth_probabilities(probabilities, matrix)
    assert mixed.dtype == torch.float32
    assert mixed.shape == probabilities.shape
    if num_tokens:
        expected = naive.spread(probabilities.tolist(), matrix.tolist())
        naive.assert_near(mixed, expected, rtol=dot_bound(1.0, num_experts))  # all terms positive
        # The loop's own distribution and the matrix's rows sum to 1 up to their float32 entries' roundings.
        naive.assert_near(mixed.double().sum(-1), [1.0] * num_tokens, rtol=3 * dot_bound(1.0, num_experts))


@every_dtype
def test_smoothed_probabilities_of_every_type_are_float32(dtype):
    probabilities, matrix = normal(9, 5).softmax(-1).to(dtype), naive.random_stochastic(5)
    mixed = smooth_probabilities(probabilities, matrix)
    assert mixed.dtype == torch.float32
    naive.assert_near(mixed, naive.spread(probabilities.tolist(), matrix.tolist()), rtol=dot_bound(1.0, 5))


@every_dtype
@pytest.mark.parametrize("num_experts", [1, 7, 128])
def test_identity_keeps_probabilities_to_the_bit(num_experts, dtype):
    probabilities = normal(21, num_experts, scale=4.0).softmax(-1).to(dtype)
    naive.assert_same_bits(smooth_probabilities(probabilities, torch.eye(num_experts)), probabilities.float())


def test_scores_read_the_columns_and_logits_the_rows():
    """p(j | k) = A_kj: from expert 0 all goes to expert 1, where a transposed matrix would bring all from there."""
    matrix = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert smooth_probabilities(torch.tensor([[0.5, 0.25, 0.25]]), matrix).tolist() == [[0.0, 0.75, 0.25]]
    assert smooth_logits(torch.tensor([[1.0, 2.0, 3.0]]), matrix).tolist() == [[2.0, 2.0, 3.0]]


# Precision


@pytest.mark.parametrize("function", [smooth_logits, smooth_probabilities, smooth_scores, smooth_sigmoid_scores])
def test_smoothing_under_autocast_is_that_without(function):
    logits, matrix = normal(50, 7).softmax(-1), naive.random_stochastic(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        smoothed = function(logits, matrix)
    naive.assert_same_bits(smoothed, function(logits, matrix))


@every_dtype
def test_smoothed_weight_under_autocast_is_that_without(dtype):
    weight, matrix = normal(7, 16, dtype=dtype), naive.random_stochastic(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        smoothed = smooth_weight(weight, matrix)
        unchanged = smooth_weight(weight, torch.eye(7))
    naive.assert_same_bits(smoothed, smooth_weight(weight, matrix))
    naive.assert_same_bits(unchanged, weight)


@pytest.mark.parametrize(
    "function", [smooth_logits, smooth_probabilities, smooth_scores, smooth_sigmoid_scores, smooth_weight]
)
def test_inputs_are_left_as_they_were(function):
    tensor, matrix = normal(5, 5).softmax(-1), naive.random_stochastic(5)
    before = tensor.clone(), matrix.clone()
    assert not torch.equal(function(tensor, matrix), tensor)
    naive.assert_same_bits(tensor, before[0])
    naive.assert_same_bits(matrix, before[1])


# Refusals


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (smooth_logits, (9, 7)),
        (smooth_probabilities, (9, 7)),
        (smooth_scores, (9, 7)),
        (smooth_sigmoid_scores, (9, 7)),
        (smooth_weight, (7, 9)),
        (smooth_weight, (7,)),
    ],
)
@pytest.mark.parametrize("num_experts", [5, 1, 8])
def test_other_number_of_experts_is_refused_with_both(function, shape, num_experts):
    with pytest.raises(ValueError) as refused:
        function(torch.ones(shape), torch.eye(num_experts))
    numbers = re.findall(r"\d+", str(refused.value))
    assert "7" in numbers
    assert str(num_experts) in numbers
