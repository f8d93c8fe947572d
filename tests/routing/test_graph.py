"""Counts, moving average and transition matrix against loops over tokens and experts."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from symphony_hf.routing.graph import (
    adjacency_problems,
    count_coselections,
    initial_adjacency,
    mix_with_identity,
    routing_residual,
    transition_matrix,
    update_adjacency,
    without_autocast,
)

from . import naive

EVERY_FORM = [(normalization, self_loops) for normalization in naive.NORMALIZATIONS for self_loops in (True, False)]
every_form = pytest.mark.parametrize(("normalization", "self_loops"), EVERY_FORM)

# A row's sum of E terms, a root, a product and a quotient: at most E + 4 roundings, of which E <= 128 here.
RTOL = 132 * naive.EPS32


def assert_rounded(computed, expected, normalization, rtol=RTOL):
    """Compare up to rounding: of each entry, or of a row's largest where `centred` has differences of probabilities."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    naive.assert_near(computed, expected.tolist(), rtol=rtol, atol=rtol * largest if normalization == "centred" else 0)


def counted(chosen, num_experts, top_k, mask=None):
    return count_coselections(naive.as_indices(chosen, top_k), num_experts, mask)


def from_tokens(num_tokens, num_experts, top_k, seed=0, never=()):
    """The co-selections of random tokens, a token, and the experts chosen: C / T in float32."""
    chosen = naive.choose(num_tokens, num_experts, top_k, seed, never)
    return counted(chosen, num_experts, top_k) / num_tokens


# Counts


@naive.many
@given(naive.selections(), st.sampled_from([torch.int64, torch.int32]))
def test_counts_are_those_of_a_loop(selection, dtype):
    chosen, num_experts, top_k = selection
    counts = count_coselections(naive.as_indices(chosen, top_k, dtype), num_experts)
    assert counts.dtype == torch.float32
    assert counts.tolist() == naive.count(chosen, num_experts)


@naive.many
@given(naive.selections(), st.data(), st.sampled_from([torch.bool, torch.int64, torch.float32]))
def test_masked_tokens_are_not_counted(selection, data, dtype):
    chosen, num_experts, top_k = selection
    mask = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    counts = counted(chosen, num_experts, top_k, torch.tensor(mask, dtype=dtype))
    assert counts.tolist() == naive.count(chosen, num_experts, mask)


@naive.few
@given(naive.selections())
def test_counts_are_symmetric_with_the_load_on_the_diagonal(selection):
    chosen, num_experts, top_k = selection
    counts = counted(chosen, num_experts, top_k)
    assert counts.tolist() == counts.T.tolist()
    for expert in range(num_experts):
        assert counts[expert, expert] == sum(expert in token for token in chosen)


@pytest.mark.parametrize("autocast", [False, True])
def test_odd_counts_above_256_are_exact(autocast):
    """Bfloat16 holds integers to 256: counted in it, under autocast, larger ones would be rounded."""
    chosen = naive.choose(5000, 6, 2)
    expected = naive.count(chosen, 6)
    assert sum(value > 256 and value % 2 == 1 for row in expected for value in row) >= 4
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        counts = counted(chosen, 6, 2, torch.ones(5000, dtype=torch.bool))
    assert counts.dtype == torch.float32
    assert counts.tolist() == expected


def test_large_counts_are_exact():
    indices = torch.tensor([[1, 0]]).expand(100_001, 2)
    assert count_coselections(indices, 3).tolist() == [[100_001, 100_001, 0], [100_001, 100_001, 0], [0, 0, 0]]


# Moving average


@naive.many
@given(naive.graphs(), st.floats(0, 1), st.integers(1, 40), st.sampled_from([torch.int64, torch.int32, torch.float32]))
def test_update_is_the_moving_average(adjacency, decay, num_tokens, dtype):
    num_experts = len(adjacency)
    counts = counted(naive.choose(num_tokens, num_experts, 1 + num_experts // 2, 7), num_experts, 1 + num_experts // 2)
    before = adjacency.clone()
    updated = update_adjacency(adjacency, counts, torch.tensor(num_tokens, dtype=dtype), decay)
    expected = naive.moving_average(adjacency.tolist(), counts.tolist(), num_tokens, decay)
    # Two products, a quotient, a sum and the coefficients' rounding, all of positive terms: 6 roundings. `atol` is
    # for products with a decay near 0, which underflow.
    naive.assert_near(updated, expected, rtol=6 * naive.EPS32, atol=1e-37)
    assert updated.dtype == torch.float32
    naive.assert_same_bits(adjacency, before)


@naive.few
@given(naive.graphs(), st.floats(0, 1), st.sampled_from([torch.int64, torch.float32]))
def test_no_token_leaves_the_graph(adjacency, decay, dtype):
    updated = update_adjacency(adjacency, torch.zeros_like(adjacency), torch.tensor(0, dtype=dtype), decay)
    naive.assert_same_bits(updated, adjacency)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("entries", ["one", "all"])
def test_counts_that_are_not_finite_leave_the_graph(poison, entries):
    adjacency = naive.random_graph(5)
    counts = counted(naive.choose(20, 5, 2), 5, 2)
    counts[(3, 1) if entries == "one" else slice(None)] = poison
    naive.assert_same_bits(update_adjacency(adjacency, counts, torch.tensor(20), 0.9), adjacency)
    naive.assert_same_bits(update_adjacency(adjacency, counts, torch.tensor(0), 0.9), adjacency)


def test_update_waits_for_no_device():
    """A meta tensor has no values: an `if` on one, which would wait for a real device, raises."""
    updated = update_adjacency(
        torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta"), torch.empty((), device="meta"), 0.9
    )
    assert updated.is_meta
    assert updated.shape == (4, 4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_graph_stays_symmetric_and_valid_over_updates(decay):
    adjacency = initial_adjacency(7, 3)
    expected = adjacency.tolist()
    for step in range(10):
        chosen = naive.choose(30, 7, 3, seed=step)
        adjacency = update_adjacency(adjacency, counted(chosen, 7, 3), torch.tensor(30), decay)
        expected = naive.moving_average(expected, naive.count(chosen, 7), 30, decay)
        assert adjacency_problems(adjacency, 7) == []
    # 10 updates of 6 roundings each.
    naive.assert_near(adjacency, expected, rtol=60 * naive.EPS32)
    naive.assert_same_bits(adjacency, adjacency.T.contiguous())


# The start

SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (7, 1), (7, 3), (7, 7), (16, 2), (49, 3), (60, 4), (64, 8), (128, 8)]


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_start_is_even_load_and_no_company(num_experts, top_k):
    adjacency = initial_adjacency(num_experts, top_k)
    expected = [[top_k / num_experts if j == k else 0.0 for k in range(num_experts)] for j in range(num_experts)]
    naive.assert_near(adjacency, expected, rtol=2 * naive.EPS32)  # a quotient and a product
    assert adjacency.dtype == torch.float32
    assert adjacency_problems(adjacency, num_experts) == []


def test_start_is_put_on_the_device_asked_for():
    assert initial_adjacency(4, 2, device="meta").is_meta
    assert initial_adjacency(4, 2, device=torch.device("cpu")).device.type == "cpu"


@every_form
@naive.many
@given(st.integers(1, 150), st.data())
def test_first_transition_is_the_identity_to_the_bit(normalization, self_loops, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    transition = transition_matrix(initial_adjacency(num_experts, top_k), normalization, self_loops)
    naive.assert_same_bits(transition, torch.eye(num_experts))


@every_form
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_first_transition_is_the_identity_at_awkward_sizes(normalization, self_loops, num_experts, top_k):
    transition = transition_matrix(initial_adjacency(num_experts, top_k), normalization, self_loops)
    naive.assert_same_bits(transition, torch.eye(num_experts))


@every_form
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_one_expert_a_token_keeps_the_identity(normalization, self_loops, decay):
    """K = 1: an expert never meets another, so the counts are diagonal and the graph has nothing to say."""
    adjacency = initial_adjacency(7, 1)
    for step in range(300):
        chosen = naive.choose(9, 7, 1, seed=step)
        adjacency = update_adjacency(adjacency, counted(chosen, 7, 1), torch.tensor(9), decay)
        if step % 30 == 29:
            naive.assert_same_bits(transition_matrix(adjacency, normalization, self_loops), torch.eye(7))
    assert len(set(adjacency.diagonal().tolist())) == 7  # the loads were learned, so there was something to cancel


# Transition


@every_form
@naive.many
@given(naive.graphs())
def test_transition_is_that_of_a_loop(normalization, self_loops, adjacency):
    before = adjacency.clone()
    transition = transition_matrix(adjacency, normalization, self_loops)
    assert_rounded(transition, naive.transition(adjacency.tolist(), normalization, self_loops), normalization)
    assert transition.dtype == torch.float32
    naive.assert_same_bits(adjacency, before)


def test_row_with_self_loops_is_the_default():
    adjacency = naive.random_graph(6)
    naive.assert_same_bits(transition_matrix(adjacency), transition_matrix(adjacency, "row", True))


@pytest.mark.parametrize("num_tokens", [1, 8, 500])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_rows_sum_to_one(num_experts, top_k, num_tokens):
    adjacency = from_tokens(num_tokens, num_experts, top_k)
    for self_loops in (True, False):
        transition = transition_matrix(adjacency, "row", self_loops)
        naive.assert_near(transition.double().sum(-1), torch.ones(num_experts), rtol=RTOL)
        assert (transition >= 0).all()


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_conditional_rows_sum_to_k_and_are_k_times_the_stochastic_ones(num_experts, top_k):
    adjacency = from_tokens(400, num_experts, top_k)
    chosen = adjacency.diagonal() > 0
    conditional = transition_matrix(adjacency, "conditional")
    row = transition_matrix(adjacency, "row")
    naive.assert_near(conditional[chosen].double().sum(-1), [float(top_k)] * int(chosen.sum()), rtol=RTOL)
    naive.assert_near(conditional[chosen], (top_k * row[chosen].double()).tolist(), rtol=2 * RTOL)
    assert conditional.diagonal().tolist() == [1.0] * num_experts  # an expert's own logit is kept whole
    assert (conditional <= 1).all()  # each one is a chance


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (7, 3), (60, 4)])
def test_an_expert_hears_itself_by_one_part_in_k(num_experts, top_k):
    transition = transition_matrix(from_tokens(400, num_experts, top_k))
    naive.assert_near(transition.diagonal(), [1 / top_k] * num_experts, rtol=RTOL)


@pytest.mark.parametrize("normalization", ["row", "conditional", "symmetric"])
def test_without_self_loops_an_expert_hears_its_neighbours_alone(normalization):
    transition = transition_matrix(from_tokens(400, 7, 3), normalization, self_loops=False)
    assert transition.diagonal().tolist() == [0.0] * 7
    if normalization == "conditional":
        naive.assert_near(transition.sum(-1), [2.0] * 7, rtol=RTOL)  # K - 1 neighbours


def pairs_of_independent_choices(weights):
    """Co-selections of two experts per token, where a pair is chosen in proportion to the product of its weights."""
    pairs_EE = torch.outer(weights, weights) * (1 - torch.eye(len(weights)))
    pairs_EE /= pairs_EE.sum() / 2
    return pairs_EE + pairs_EE.sum(-1).diag()


@pytest.mark.parametrize("num_experts", [2, 4, 16, 64])
def test_centred_is_the_identity_under_independent_choices_at_even_load(num_experts):
    adjacency = pairs_of_independent_choices(torch.ones(num_experts))
    naive.assert_near(transition_matrix(adjacency, "centred"), torch.eye(num_experts).tolist(), rtol=RTOL, atol=RTOL)


def error_of_centred(weights):
    """Return the largest deviation from the identity, and by what factor the loads differ."""
    adjacency = pairs_of_independent_choices(weights)
    loads = adjacency.diagonal()
    return (transition_matrix(adjacency, "centred") - torch.eye(len(weights))).abs().max(), loads.max() / loads.min()


def test_centred_is_nearly_the_identity_under_independent_choices_at_uneven_load():
    """The docstring's figures. The probabilities themselves are up to 0.1 where loads are spread evenly."""
    error, factor = error_of_centred(torch.linspace(1, 6, 16))
    assert factor > 5
    assert error < 1e-3
    assert (transition_matrix(pairs_of_independent_choices(torch.linspace(1, 6, 16)), "conditional")).triu(
        1
    ).max() > 0.1
    # Of 16 experts, one with weight 7 has (7 * 15) / (7 + 14) = 5 times the load of each other.
    worst, factor = error_of_centred(torch.tensor([7.0] + [1.0] * 15))
    assert factor == pytest.approx(5)
    assert worst == pytest.approx(0.022, abs=5e-4)  # to the digits of the docstring
    for seed in range(200):
        skew = 0.2 + 10 * torch.rand((), generator=torch.Generator().manual_seed(seed))
        error, factor = error_of_centred(1 + 6 * torch.rand(16, generator=torch.Generator().manual_seed(seed)) ** skew)
        assert error <= worst or factor > 5


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_centred_rows_sum_to_one_and_keep_an_experts_own_logit(num_experts, top_k):
    transition = transition_matrix(from_tokens(400, num_experts, top_k), "centred")
    naive.assert_near(transition.double().sum(-1), torch.ones(num_experts), rtol=RTOL, atol=top_k * RTOL)
    assert transition.diagonal().tolist() == [1.0] * num_experts


def test_centred_has_positive_and_negative_edges():
    """Experts 0 and 1 always meet, and 2 and 3: each pair attracts, and every other repels."""
    adjacency = counted([[0, 1], [2, 3]] * 5, 4, 2) / 10
    transition = transition_matrix(adjacency, "centred")
    assert transition[0, 1] > 0.5
    assert (transition[0, 2:] < -0.2).all()


@pytest.mark.parametrize("self_loops", [True, False])
@naive.many
@given(naive.graphs())
def test_symmetric_transition_is_symmetric(self_loops, adjacency):
    transition = transition_matrix(adjacency, "symmetric", self_loops)
    naive.assert_near(transition, transition.T.tolist(), rtol=4 * naive.EPS32)  # the order of two products


@every_form
def test_expert_never_chosen_keeps_the_identitys_row(normalization, self_loops):
    """From the start to where its decayed load has underflown to zero, beside experts that have met."""
    num_experts, top_k, never = 7, 2, (2, 5)
    adjacency = initial_adjacency(num_experts, top_k)
    identity = torch.eye(num_experts)
    seen = set()
    for step in range(160):
        chosen = naive.choose(10, num_experts, top_k, seed=step, never=never)
        adjacency = update_adjacency(adjacency, counted(chosen, num_experts, top_k), torch.tensor(10), 0.5)
        transition = transition_matrix(adjacency, normalization, self_loops)
        for expert in never:
            naive.assert_same_bits(transition[expert], identity[expert])
        naive.assert_same_bits(transition[:, never], identity[:, never])  # and nobody hears it
        seen.add(float(adjacency[2, 2]))
    assert 0.0 in seen
    assert any(0 < load < 2.0**-126 for load in seen)  # denormals were met on the way
    assert not torch.equal(transition, identity)


@every_form
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-42])
def test_underflown_row_is_the_identitys(normalization, self_loops, tiny):
    adjacency = naive.random_graph(6)
    adjacency[2] = adjacency[:, 2] = tiny
    transition = transition_matrix(adjacency, normalization, self_loops)
    naive.assert_same_bits(transition[2], torch.eye(6)[2])
    assert torch.isfinite(transition).all()
    rest = [0, 1, 3, 4, 5]
    expected = naive.transition(adjacency[rest][:, rest].tolist(), normalization, self_loops)
    assert_rounded(transition[rest][:, rest], expected, normalization)


@every_form
@pytest.mark.parametrize("tiny", [0.0, 1e-42])
def test_graph_underflown_everywhere_is_the_identity(normalization, self_loops, tiny):
    adjacency = torch.full((5, 5), tiny)
    naive.assert_same_bits(transition_matrix(adjacency, normalization, self_loops), torch.eye(5))


@every_form
@pytest.mark.parametrize("power", [-100, -60, -20, 20])
def test_transition_does_not_depend_on_the_scale(normalization, self_loops, power):
    """A graph that decays keeps its shape until it underflows: no epsilon hides in the quotient."""
    adjacency = naive.random_graph(6)
    adjacency[1] *= 2.0**-10
    adjacency[:, 1] *= 2.0**-10
    transition = transition_matrix(adjacency, normalization, self_loops)
    scaled = transition_matrix(adjacency * 2.0**power, normalization, self_loops)
    assert_rounded(scaled, transition, normalization, rtol=4 * naive.EPS32)


@every_form
@naive.few
@given(naive.graphs(), st.randoms(use_true_random=False))
def test_permuting_the_experts_permutes_the_transition(normalization, self_loops, adjacency, random):
    order = list(range(len(adjacency)))
    random.shuffle(order)
    permuted = transition_matrix(adjacency[order][:, order], normalization, self_loops)
    expected = transition_matrix(adjacency, normalization, self_loops)[order][:, order]
    assert_rounded(permuted, expected, normalization, rtol=2 * RTOL)  # the sums run in another order


@every_form
@pytest.mark.parametrize("batch", [(3,), (2, 3), (1, 1, 2), (0,)])
def test_batch_is_a_loop_over_its_graphs(normalization, self_loops, batch):
    num_graphs = torch.Size(batch).numel()
    adjacencies = [naive.random_graph(5, seed, silent={seed % 5}) for seed in range(num_graphs)]
    stacked = torch.stack(adjacencies) if adjacencies else torch.empty(0, 5, 5)
    transition = transition_matrix(stacked.reshape(*batch, 5, 5), normalization, self_loops)
    mixed = mix_with_identity(transition, 0.3)
    assert transition.shape == mixed.shape == (*batch, 5, 5)
    for one, many, mix in zip(adjacencies, transition.reshape(-1, 5, 5), mixed.reshape(-1, 5, 5), strict=True):
        expected = transition_matrix(one, normalization, self_loops)
        assert_rounded(many, expected, normalization, rtol=2 * RTOL)
        naive.assert_near(mix, naive.mix(many.tolist(), 0.3), rtol=0, atol=4 * naive.EPS32)  # entries at most 1


@every_form
@pytest.mark.parametrize("silent", [(), (1,), (0, 1, 2, 3, 4)])
def test_gradient_is_finite_at_rows_without_mass(normalization, self_loops, silent):
    adjacency = naive.random_graph(5, silent=silent).requires_grad_()
    transition_matrix(adjacency, normalization, self_loops).square().sum().backward()
    assert torch.isfinite(adjacency.grad).all()


@every_form
def test_gradient_is_finite_at_the_start(normalization, self_loops):
    adjacency = initial_adjacency(5, 2).requires_grad_()
    transition_matrix(adjacency, normalization, self_loops).square().sum().backward()
    assert torch.isfinite(adjacency.grad).all()


@every_form
def test_gradient_is_that_of_finite_differences(normalization, self_loops):
    adjacency = torch.full((4, 4), 0.2) + naive.random_graph(4)  # away from zeros, where the loop has branches
    weight = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).tolist()

    def weighted(rows):
        transition = naive.transition(rows, normalization, self_loops)
        return sum(weight[j][k] * transition[j][k] for j in range(4) for k in range(4))

    adjacency.requires_grad_()
    (transition_matrix(adjacency, normalization, self_loops) * torch.tensor(weight)).sum().backward()
    # The reference differentiates in double precision (off by about 1e-10); the gradient is a sum of some ten
    # float32 terms of size 1, which cancel in part.
    naive.assert_near(adjacency.grad, naive.slope(weighted, adjacency.tolist()), rtol=1e-5, atol=2e-6)


def test_unknown_normalization_is_refused_by_name():
    with pytest.raises(ValueError) as refused:
        transition_matrix(initial_adjacency(4, 2), "rows")
    assert "'rows'" in str(refused.value)
    for name in naive.NORMALIZATIONS:
        assert name in str(refused.value).replace("'rows'", "")


def test_transition_under_autocast_is_that_without():
    adjacency = naive.random_graph(6)
    for normalization, self_loops in EVERY_FORM:
        expected = transition_matrix(adjacency, normalization, self_loops)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            naive.assert_same_bits(transition_matrix(adjacency, normalization, self_loops), expected)
            mixed = mix_with_identity(expected, 0.3)
        naive.assert_same_bits(mixed, mix_with_identity(expected, 0.3))


# Strength


@naive.many
@given(naive.graphs(), st.floats(0, 1, width=32), st.booleans())
def test_mixed_matrix_is_that_of_a_loop(adjacency, strength, as_tensor):
    transition = transition_matrix(adjacency)
    before = transition.clone()
    mixed = mix_with_identity(transition, torch.tensor(strength) if as_tensor else strength)
    # Entries are at most 1, and three operations round: the difference, the product, the sum.
    naive.assert_near(mixed, naive.mix(transition.tolist(), strength), rtol=0, atol=3 * naive.EPS32)
    naive.assert_same_bits(transition, before)


@every_form
@pytest.mark.parametrize("strength", [0.0, 0, torch.tensor(0.0)])
def test_strength_zero_is_the_identity_to_the_bit(normalization, self_loops, strength):
    transition = transition_matrix(naive.random_graph(7, silent={3}), normalization, self_loops)
    naive.assert_same_bits(mix_with_identity(transition, strength), torch.eye(7))


@naive.many
@given(st.integers(1, 20), st.floats(0, 1, width=32), st.booleans())
def test_identity_stays_the_identity_at_any_strength(num_experts, strength, as_tensor):
    mixed = mix_with_identity(torch.eye(num_experts), torch.tensor(strength) if as_tensor else strength)
    naive.assert_same_bits(mixed, torch.eye(num_experts))


@every_form
@naive.many
@given(naive.graphs(), st.floats(0, 1, width=32), st.booleans())
def test_residual_is_the_mixed_matrix_less_the_identity(normalization, self_loops, adjacency, strength, as_tensor):
    before = adjacency.clone()
    residual = routing_residual(adjacency, torch.tensor(strength) if as_tensor else strength, normalization, self_loops)
    transition = naive.transition(adjacency.tolist(), normalization, self_loops)
    expected = [[strength * (value - (j == k)) for k, value in enumerate(row)] for j, row in enumerate(transition)]
    largest = max(abs(value) for row in transition for value in row)
    naive.assert_near(residual, expected, rtol=2 * RTOL, atol=2 * RTOL * max(1.0, largest))
    naive.assert_same_bits(adjacency, before)


@every_form
@pytest.mark.parametrize("strength", [1.0, 0.3, torch.tensor(0.3)])
def test_residual_is_zero_to_the_bit_at_the_start(normalization, self_loops, strength):
    for num_experts, top_k in ((1, 1), (7, 2), (60, 4), (128, 8)):
        residual = routing_residual(initial_adjacency(num_experts, top_k), strength, normalization, self_loops)
        assert not residual.any()


@every_form
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-42])
def test_residual_is_zero_at_strength_zero_and_in_rows_without_mass(normalization, self_loops, tiny):
    adjacency = naive.random_graph(6)
    assert not routing_residual(adjacency, 0.0, normalization, self_loops).any()
    adjacency[2] = adjacency[:, 2] = tiny
    residual = routing_residual(adjacency, 1.0, normalization, self_loops)
    assert not residual[2].any()
    assert residual[3].any()
    adjacency[3, 4] = adjacency[4, 3] = torch.nan
    assert routing_residual(adjacency, 1.0, normalization, self_loops)[3].isnan().any()


@every_form
@pytest.mark.parametrize("silent", [(), (1,), (0, 1, 2, 3, 4)])
def test_gradient_of_the_residual_is_that_of_the_mixed_matrix(normalization, self_loops, silent):
    gradients = []
    for function in (routing_residual, lambda graph, s, *form: mix_with_identity(transition_matrix(graph, *form), s)):
        adjacency = naive.random_graph(5, silent=silent).requires_grad_()
        weights = torch.arange(25.0).reshape(5, 5)
        (function(adjacency, 0.7, normalization, self_loops) * weights).sum().backward()
        gradients.append(adjacency.grad)
    naive.assert_near(gradients[0], gradients[1].tolist(), rtol=1e-4, atol=1e-4)


def test_strength_has_a_gradient():
    transition = transition_matrix(naive.random_graph(4))
    strength = torch.tensor(0.3, requires_grad=True)
    mix_with_identity(transition, strength)[0].square().sum().backward()
    mixed = naive.mix(transition.tolist(), 0.3)[0]
    expected = sum(2 * mixed[k] * (transition[0, k].item() - (k == 0)) for k in range(4))
    naive.assert_near(strength.grad, expected, rtol=1e-5)  # a sum of four float32 products, hardly cancelling


# Precision


def test_region_without_autocast():
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
        with without_autocast(ones):
            assert (ones @ ones).dtype == torch.float32
        assert (ones @ ones).dtype == torch.bfloat16
    with without_autocast(torch.empty(2, device="meta")):
        assert (ones @ ones).dtype == torch.float32


# Graphs from files


def good_graph(num_experts=4, dtype=torch.float32):
    return naive.random_graph(num_experts, seed=3).to(dtype)


def with_entry(*entries):
    graph = good_graph()
    for j, k, value in entries:
        graph[j, k] = value
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_good_graph_has_no_problem(dtype):
    """Rounding to fewer bits rounds both of a pair alike."""
    assert adjacency_problems(good_graph(dtype=dtype), 4) == []
    assert adjacency_problems(from_tokens(333, 7, 3).to(dtype), 7) == []
    assert adjacency_problems(initial_adjacency(60, 4).to(dtype), 60) == []


@pytest.mark.parametrize(
    ("graph", "word"),
    [
        (good_graph(5), "5"),
        (torch.zeros(4, 5), "5"),
        (torch.zeros(4), "shape"),
        (torch.zeros(1, 4, 4), "shape"),
        (torch.zeros(()), "shape"),
        (torch.zeros(0, 0), "shape"),
        (torch.eye(4, dtype=torch.int64), "int64"),
        (torch.eye(4, dtype=torch.bool), "bool"),
        (torch.eye(4, dtype=torch.complex64), "complex64"),
        (with_entry((1, 1, float("nan"))), "finite"),
        (with_entry((2, 2, float("inf"))), "finite"),
        (with_entry((0, 1, float("inf")), (1, 0, float("inf"))), "finite"),
        (with_entry((3, 3, -0.1)), "negative"),
        (with_entry((0, 2, -0.1), (2, 0, -0.1)), "negative"),
        (with_entry((0, 2, 0.3), (2, 0, 0.1)), "symmetric"),
    ],
)
def test_bad_graph_has_one_problem_named(graph, word):
    problems = adjacency_problems(graph, 4)
    assert len(problems) == 1
    assert word in problems[0]


def test_wrong_shape_names_both_sizes():
    (problem,) = adjacency_problems(good_graph(5), 4)
    assert "5" in problem
    assert "4" in problem


def test_each_problem_is_told():
    problems = " ".join(adjacency_problems(with_entry((0, 2, -0.3), (2, 0, 0.1)), 4))
    assert "negative" in problems
    assert "symmetric" in problems


@pytest.mark.parametrize("entries", [[(0, 1, float("nan"))], [(0, 1, float("nan")), (1, 0, float("nan"))]])
def test_nan_off_the_diagonal_is_told(entries):
    assert any("finite" in problem for problem in adjacency_problems(with_entry(*entries), 4))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.complex128])
def test_strange_types_get_an_answer_and_no_exception(dtype):
    problems = adjacency_problems(torch.full((4, 4), 0.5).to(dtype), 4)
    assert all(isinstance(problem, str) for problem in problems)
    if not dtype.is_floating_point:
        assert problems


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_in_eight_bits_is_told(dtype):
    assert adjacency_problems(with_entry((1, 1, float("nan"))).to(dtype), 4)


def symmetric_3x3(values):
    upper = torch.tensor(values).reshape(3, 3).triu()
    return upper + upper.triu(1).T


@naive.many
@given(st.lists(st.floats(width=32) | st.sampled_from([0.0, 0.25, 1.0]), min_size=9, max_size=9))
def test_symmetric_graph_has_a_problem_just_where_an_entry_is_bad(values):
    graph = symmetric_3x3(values)
    good = all(0 <= value < float("inf") for row in graph.tolist() for value in row)
    assert (adjacency_problems(graph, 3) == []) == good


@every_form
@naive.many
@given(st.lists(st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 1.0]), min_size=9, max_size=9))
@example([1e-39, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # an expert met more often than it was chosen
def test_graph_without_problems_makes_a_finite_transition(normalization, self_loops, values):
    """What the check lets in from a file must not put NaN into a model."""
    graph = symmetric_3x3(values)
    assert adjacency_problems(graph, 3) == []
    assert torch.isfinite(transition_matrix(graph, normalization, self_loops)).all()
