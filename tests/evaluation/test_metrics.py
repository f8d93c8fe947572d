"""Accuracy, F1 and Matthews' correlation with intervals, against scikit-learn and loops over resamples."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.metrics import (
    METRICS,
    Choices,
    compare_changes,
    compare_choices,
    metric_interval,
    pooled_choices,
)
from symphony_hf.evaluation.statistics import paired_bootstrap

REFERENCES = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}
NAIVE = {  # scikit-learn's, but for its checks of each call, which take most of its time
    "accuracy": lambda answers, chosen: (answers == chosen).mean(),
    "f1": lambda answers, chosen: 2 * (answers & chosen).sum() / (answers.sum() + chosen.sum()),
    "matthews": lambda answers, chosen: np.corrcoef(answers, chosen)[0, 1],
}


def choices_of(answers, right, rng, forms=1):
    """Right with a probability, each form on its own."""
    hits = rng.random((forms, len(answers))) < right
    return Choices(np.where(hits, answers, 1 - answers), answers)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", REFERENCES)
def test_metrics_are_those_of_scikit_learn(name, rng):
    for _ in range(5):
        choices = choices_of(rng.integers(0, 2, 30), 0.7, rng)
        expected = REFERENCES[name](choices.answers, choices.chosen[0])
        assert METRICS[name].of(choices) == pytest.approx(expected)
        assert NAIVE[name](choices.answers, choices.chosen[0]) == pytest.approx(expected)


def test_metrics_of_one_answer_only_are_those_of_scikit_learn():
    answers = np.array([0, 0, 1, 1])
    for name, reference in REFERENCES.items():
        for chosen in (np.zeros(4, dtype=int), np.ones(4, dtype=int)):
            assert METRICS[name].of(Choices(chosen[None], answers)) == pytest.approx(reference(answers, chosen)), name


def test_accuracy_takes_any_number_of_answers():
    choices = Choices(np.array([[0, 1, 2, 2, 4]]), np.array([0, 1, 2, 3, 4]))
    assert METRICS["accuracy"].of(choices) == 0.8


@pytest.mark.parametrize("name", REFERENCES)
def test_forms_together_are_counted_together(name, rng):
    """The metric of three forms of each question is that of all answers in one list."""
    answers = rng.integers(0, 2, 25)
    forms = [choices_of(answers, right, rng) for right in (0.6, 0.9, 0.8)]
    together = pooled_choices(forms)
    chosen = np.concatenate([form.chosen[0] for form in forms])
    assert METRICS[name].of(together) == pytest.approx(REFERENCES[name](np.tile(answers, 3), chosen))


@pytest.mark.thorough
@pytest.mark.parametrize("name", REFERENCES)
def test_intervals_are_those_of_a_loop_over_resamples(name, rng):
    answers = rng.integers(0, 2, 80)
    clean_a, clean_b = choices_of(answers, 0.9, rng), choices_of(answers, 0.8, rng)
    attacked_a, attacked_b = choices_of(answers, 0.7, rng, forms=2), choices_of(answers, 0.75, rng, forms=2)
    reference = NAIVE[name]

    def value(choices, places):
        forms = len(choices.chosen)
        return reference(np.tile(answers[places], forms), choices.chosen[:, places].reshape(-1))

    kinds = {
        "level": lambda places: value(clean_a, places),
        "difference": lambda places: value(clean_a, places) - value(clean_b, places),
        "changes": lambda places: (
            (value(attacked_a, places) - value(clean_a, places)) - (value(attacked_b, places) - value(clean_b, places))
        ),
    }
    metric = METRICS[name]
    found = {
        "level": metric_interval(metric, clean_a),
        "difference": compare_choices(metric, clean_a, clean_b),
        "changes": compare_changes(metric, clean_a, attacked_a, clean_b, attacked_b),
    }
    resamples = rng.integers(0, 80, (400, 80))
    for what, interval in found.items():
        assert interval.estimate == pytest.approx(kinds[what](np.arange(80))), what
        # Hesterberg's expanded level at 80 questions: Phi(-sqrt(80 / 79) * 1.9905), of Student's t with 79 degrees.
        low, high = np.quantile([kinds[what](places) for places in resamples], [0.0226, 1 - 0.0226])
        # 400 draws place a quantile that far out to about 7% of the width.
        np.testing.assert_allclose([interval.low, interval.high], [low, high], atol=0.15 * (high - low))


def test_a_few_questions_that_differ_alone_make_no_verdict():
    """Four coins fall alike in one of eight throws; a bootstrap takes that for a difference."""
    ones = np.ones(60, dtype=int)
    better, worse = Choices(ones[None], ones), Choices(np.where(np.arange(60) < 4, 0, 1)[None], ones)
    interval = compare_choices(METRICS["accuracy"], better, worse)
    assert interval.low > 0
    assert interval.p_value == pytest.approx(1 / 8, rel=0.1)
    assert interval.verdict(lower_is_better=False) == "not distinguishable"
    ten = Choices(np.where(np.arange(60) < 10, 0, 1)[None], ones)
    interval = compare_choices(METRICS["accuracy"], better, ten)
    assert interval.p_value == pytest.approx(2 / 2**10, abs=1e-3)
    assert interval.verdict(lower_is_better=False) == "better"


@pytest.mark.parametrize("changes", [False, True])
def test_equal_differences_are_ties_however_they_are_rounded(changes, rng):
    """Two models differ in one form of three at 14 of 1,000 questions, 11 to 3: McNemar's exact test.

    A question's count is a third, or two, so sums with the same exact value differ in their last bits.
    """
    answers = np.ones(1000, dtype=int)
    a = (rng.random((3, 1000)) < 0.7).astype(int)
    a[0, :14], b = [1] * 11 + [0] * 3, a.copy()
    b[0, :14] = 1 - a[0, :14]
    pair, metric = (Choices(a, answers), Choices(b, answers)), METRICS["accuracy"]
    clean = Choices((rng.random((1, 1000)) < 0.9).astype(int), answers)
    found = compare_changes(metric, clean, pair[0], clean, pair[1]) if changes else compare_choices(metric, *pair)
    expected = stats.binomtest(11, 14).pvalue
    # Twice a tail of 10,000 draws, which varies by 0.0033: three times that.
    assert found.p_value == pytest.approx(expected, abs=0.01)
    assert found.verdict(lower_is_better=False) == "not distinguishable"


def test_the_interval_of_ties_ends_at_exactly_no_difference(rng):
    """The same shares, added up in two orders."""
    shares = rng.choice([0.1, 0.2, 0.3, 1 / 3], (2, 12))
    interval = paired_bootstrap(
        (shares[0], shares[1], shares[1], shares[0]),
        lambda a, b, c, d, axis: a.sum(axis) + b.sum(axis) - c[..., ::-1].sum(axis) - d[..., ::-1].sum(axis),
    )
    assert (interval.low, interval.estimate, interval.high) == (0.0, 0.0, 0.0)


def test_the_exchange_test_counts_all_exchanges_of_few_documents(rng):
    """Enumerate the 1,024 exchanges of the two models over 10 documents."""
    sums, sizes, other_sums, other_sizes = rng.random((4, 10)) + 1

    def statistic(a, size_a, b, size_b, axis):
        return a.sum(axis) / size_a.sum(axis) - b.sum(axis) / size_b.sum(axis)

    columns = (sums, sizes, other_sums, other_sizes)
    interval = paired_bootstrap(columns, statistic, swapped=[(0, 2), (1, 3)])
    values = []
    for number in range(2**10):
        swap = np.array([number >> place & 1 for place in range(10)], dtype=bool)
        first, size = np.where(swap, other_sums, sums), np.where(swap, other_sizes, sizes)
        second, other_size = np.where(swap, sums, other_sums), np.where(swap, sizes, other_sizes)
        values.append(first.sum() / size.sum() - second.sum() / other_size.sum())
    values = np.array(values)
    # The way that both are is values[0]; that with all exchanged is as far off, to the other side.
    one_sided = min((values >= values[0] - 1e-12).mean(), (values <= values[0] + 1e-12).mean())
    assert interval.p_value == pytest.approx(2 * one_sided)


def test_choices_of_other_questions_are_refused(rng):
    answers = np.arange(12) % 2
    one, other = choices_of(answers, 0.5, rng), choices_of(1 - answers, 0.5, rng)
    with pytest.raises(EvaluationError, match="different questions"):
        compare_choices(METRICS["accuracy"], one, other)
    with pytest.raises(EvaluationError, match="different questions"):
        compare_changes(METRICS["accuracy"], one, one, one, other)
    few = choices_of(answers[:9], 0.5, rng)
    with pytest.raises(EvaluationError, match="9 documents are too few"):
        metric_interval(METRICS["accuracy"], few)
