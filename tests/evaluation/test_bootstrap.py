"""The intervals: known answers, false alarms, and what identical models give."""

import numpy as np
import pytest

from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.comparison import compare_perplexity, compare_robustness, perplexity_interval
from symphony_hf.evaluation.perplexity import DocumentScores
from symphony_hf.evaluation.statistics import Interval, paired_bootstrap


def make_scores(nll_per_token, tokens):
    return DocumentScores([str(number) for number in range(len(tokens))], nll_per_token * tokens, tokens)


def draw_documents(rng, num_documents, spread=0.8):
    """Lengths as uneven as those of encyclopedia articles, and how hard each document is, in nats a token."""
    tokens = rng.lognormal(7.5, spread, num_documents).astype(np.int64) + 50
    return tokens, 3.5 + 0.25 * rng.standard_normal(num_documents)


def mean_difference(nll_a, nll_b, tokens, axis):
    return (nll_a.sum(axis) - nll_b.sum(axis)) / tokens.sum(axis)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_planted_difference_is_found_and_has_a_direction(rng):
    tokens, hardness = draw_documents(rng, 40)
    a = make_scores(hardness - 0.05 + 0.03 * rng.standard_normal(40), tokens)
    b = make_scores(hardness, tokens)
    ours, theirs = compare_perplexity(a, b), compare_perplexity(b, a)
    assert ours.low < -0.05 < ours.high < 0
    assert ours.estimate == pytest.approx((a.nll.sum() - b.nll.sum()) / tokens.sum())
    assert (ours.verdict(), theirs.verdict()) == ("better", "worse")
    assert ours.verdict(lower_is_better=False) == "worse"
    assert (ours.confidence, ours.num_documents, ours.seed) == (0.95, 40, 0)


def test_the_ratio_of_perplexities_carries_the_verdict_over(rng):
    tokens, hardness = draw_documents(rng, 40)
    a, b = make_scores(hardness - 0.05 + 0.01 * rng.standard_normal(40), tokens), make_scores(hardness, tokens)
    ratio = compare_perplexity(a, b).exp()
    assert ratio.estimate == pytest.approx(a.perplexity / b.perplexity)
    assert ratio.null == 1.0
    assert ratio.low < ratio.estimate < ratio.high < 1
    assert ratio.verdict() == "better"


def test_two_copies_give_a_width_of_exactly_zero(rng):
    tokens, hardness = draw_documents(rng, 30)
    a, b, c, d = (make_scores(hardness + shift, tokens) for shift in (0.0, 0.0, 0.2, 0.2))
    for interval in (compare_perplexity(a, b), compare_robustness(a, c, b, d)):
        assert (interval.low, interval.estimate, interval.high) == (0.0, 0.0, 0.0)
        assert interval.verdict() == "not distinguishable"
    assert compare_perplexity(a, b).exp().verdict() == "not distinguishable"


@pytest.mark.thorough
@pytest.mark.parametrize(("num_documents", "seed"), [(10, 1), (60, 2)])
def test_false_alarms_are_about_as_rare_as_promised(num_documents, seed):
    """5% of 600 is 30, give or take 5.3; a few more are due to uneven lengths. Without the expansion for few
    documents it would be about 70 at 10 documents."""
    rng = np.random.default_rng(seed)
    alarms = 0
    for draw in range(600):
        tokens, hardness = draw_documents(rng, num_documents)
        other = hardness + 0.03 * rng.standard_normal(num_documents)
        columns = (hardness * tokens, other * tokens, tokens)
        interval = paired_bootstrap(columns, mean_difference, num_resamples=500, seed=draw)
        alarms += interval.verdict() != "not distinguishable"
    assert 12 <= alarms <= 50


def test_the_interval_is_that_of_a_loop_over_resamples(rng):
    tokens, hardness = draw_documents(rng, 25)
    a, b = make_scores(hardness + 0.02 * rng.standard_normal(25), tokens), make_scores(hardness, tokens)
    draws = []
    for _ in range(20_000):
        chosen = rng.integers(0, 25, 25)
        draws.append((a.nll[chosen].sum() - b.nll[chosen].sum()) / tokens[chosen].sum())
    # Hesterberg's expanded level at 25 documents: Phi(-sqrt(25 / 24) * 2.0639), of Student's t with 24 degrees.
    low, high = np.quantile(draws, [0.01758, 1 - 0.01758])
    interval = compare_perplexity(a, b)
    # 10,000 draws place a quantile that far out to about 2% of the width.
    np.testing.assert_allclose([interval.low, interval.high], [low, high], atol=0.04 * (high - low))


def test_pairing_removes_what_the_models_share(rng):
    tokens, hardness = draw_documents(rng, 40)
    a, b = make_scores(hardness + 0.01 * rng.standard_normal(40), tokens), make_scores(hardness, tokens)
    alone, paired = perplexity_interval(a), compare_perplexity(a, b)
    assert alone.low < a.perplexity < alone.high
    assert np.log(alone.high / alone.low) > 5 * (paired.high - paired.low)


def test_a_clean_gain_alone_is_no_robustness_but_a_smaller_loss_is(rng):
    tokens, hardness = draw_documents(rng, 50)
    attacked_tokens = tokens + 20
    noise = [0.01 * rng.standard_normal(50) for _ in range(4)]
    plain = make_scores(hardness + noise[0], tokens), make_scores(hardness + 0.25 + noise[1], attacked_tokens)
    cleaner = (
        make_scores(hardness - 0.1 + noise[2], tokens),
        make_scores(hardness + 0.15 + noise[3], attacked_tokens),
    )
    sturdier = cleaner[0], make_scores(hardness + 0.1 + noise[3], attacked_tokens)
    assert compare_perplexity(cleaner[1], plain[1]).verdict() == "better"
    assert compare_robustness(*cleaner, *plain).verdict() == "not distinguishable"
    interval = compare_robustness(*sturdier, *plain)
    ratios = [attacked.perplexity / clean.perplexity for clean, attacked in (sturdier, plain)]
    assert interval.estimate == pytest.approx(ratios[0] - ratios[1])
    assert interval.verdict() == "better"


def test_the_seed_decides_the_draws(rng):
    tokens, hardness = draw_documents(rng, 20)
    a, b = make_scores(hardness + 0.02 * rng.standard_normal(20), tokens), make_scores(hardness, tokens)
    assert compare_perplexity(a, b, seed=3) == compare_perplexity(a, b, seed=3)
    assert compare_perplexity(a, b, seed=3).low != compare_perplexity(a, b, seed=4).low


def test_the_interval_of_one_model_has_no_verdict(rng):
    with pytest.raises(EvaluationError, match="no verdict"):
        perplexity_interval(make_scores(*reversed(draw_documents(rng, 20)))).verdict()


def test_an_end_on_the_null_is_not_distinguishable():
    assert Interval(0.5, 0.0, 1.0, 0.95, 20, 0).verdict() == "not distinguishable"


def test_too_few_documents_are_refused(rng):
    tokens, hardness = draw_documents(rng, 9)
    scores = make_scores(hardness, tokens)
    with pytest.raises(EvaluationError, match=r"9 documents are too few.*10"):
        compare_perplexity(scores, scores)


def test_scores_that_are_not_finite_are_refused(rng):
    tokens, hardness = draw_documents(rng, 12)
    hardness[3] = np.inf
    with pytest.raises(EvaluationError, match="not finite"):
        perplexity_interval(make_scores(hardness, tokens))


def test_unpaired_scores_are_refused(rng):
    tokens, hardness = draw_documents(rng, 12)
    scores = make_scores(hardness, tokens)
    renamed = DocumentScores([name + "'" for name in scores.names], scores.nll, tokens)
    with pytest.raises(EvaluationError, match="different documents"):
        compare_perplexity(scores, renamed)
    with pytest.raises(EvaluationError, match="one tokenizer"):
        compare_perplexity(scores, make_scores(hardness, tokens + 1))
    with pytest.raises(EvaluationError, match="have different names"):
        compare_robustness(scores, renamed, scores, renamed)
