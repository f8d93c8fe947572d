"""Verdicts on simulated scores of documents: how often equal models are told apart, and unequal ones are not.

A verdict is wrong of equal models in 5% of draws at most: the exchange test sees to that. A count of wrong ones varies
all the same: of 200 draws at exactly 5% it is 10 on average, above that in two of five series, and above `MOST` in one
of 400. Accuracies, which take few values, stay below 10.
"""

import numpy as np
import pytest
from scipy import stats

from symphony_hf.evaluation.clean_attacked import Measured
from symphony_hf.evaluation.metrics import Choices
from symphony_hf.evaluation.robustness.metric_reports import Accuracy, Perplexity
from symphony_hf.evaluation.robustness.summary import compare_models, groups_of
from symphony_hf.evaluation.robustness.text_scores import TextScores, pooled
from symphony_hf.evaluation.settings import AttackCase

CELLS = [AttackCase("aaa", 1, 0), AttackCase("aaa", 1, 1)]
DOCUMENTS = 60
DRAWS = 200
MOST = stats.binom.ppf(1 - 1 / 400, DRAWS, 0.05)
NAMES = [f"document {number}" for number in range(DOCUMENTS)]


def text_scores(nats, tokens):
    sums = nats * tokens
    return TextScores(sums, tokens, tokens, 4 * tokens, sums, sums, tokens)


def draw_pair(rng, better=0.0, sturdier=0.0):
    """Two models on documents as uneven as those of encyclopedias. Each model has its own luck with a document, and
    with each way to attack it; `better` and `sturdier` are nats a token by which the first is ahead."""
    tokens = rng.lognormal(6.5, 0.6, DOCUMENTS).astype(np.int64) + 30
    hardness = 3.5 + 0.3 * rng.standard_normal(DOCUMENTS)
    attack = {case: 0.25 + 0.05 * rng.standard_normal(DOCUMENTS) for case in CELLS}
    pair = []
    for lead, loss in ((better, sturdier), (0.0, 0.0)):
        own = hardness - lead + 0.03 * rng.standard_normal(DOCUMENTS)
        attacked = {
            case: text_scores(own + attack[case] - loss + 0.02 * rng.standard_normal(DOCUMENTS), tokens)
            for case in CELLS
        }
        pair.append(Measured(text_scores(own, tokens), attacked))
    return pair


def verdicts(pair):
    comparisons = compare_models(*pair, Perplexity(NAMES))
    (row,) = comparisons["attacks"]
    return {
        "clean": comparisons["clean"]["verdict"],
        "attacked": row["perplexity"]["verdict"],
        "ratio": row["ratio"]["verdict"],
        "untouched": row["untouched"]["verdict"],
    }


@pytest.mark.slow
@pytest.mark.once
def test_equal_models_differ_in_at_most_one_of_twenty_draws():
    rng = np.random.default_rng(0)
    alarms = dict.fromkeys(("clean", "attacked", "ratio", "untouched"), 0)
    for _ in range(DRAWS):
        for what, verdict in verdicts(draw_pair(rng)).items():
            alarms[what] += verdict != "not distinguishable"
    assert max(alarms.values()) <= MOST, alarms


@pytest.mark.thorough
def test_better_models_and_more_robust_models_are_found():
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = verdicts(draw_pair(rng, better=0.05))
        assert (found["clean"], found["attacked"]) == ("better", "better")
        found = verdicts(draw_pair(rng, sturdier=0.05))
        assert (found["attacked"], found["ratio"]) == ("better", "better")
        found = verdicts(draw_pair(rng, better=-0.05))
        assert (found["clean"], found["attacked"]) == ("worse", "worse")


def draw_answers(rng, right=(0.7, 0.7), losses=(0.3, 0.3)):
    """Two models at questions of two answers, most of which both get right or wrong alike if they are equally good.
    Under attack each loses a share of its right answers."""
    answers = rng.integers(0, 2, DOCUMENTS)
    alike, hardness = rng.random(DOCUMENTS) < 0.6, rng.random(DOCUMENTS)
    pair = []
    for share, loss in zip(right, losses, strict=True):
        own = np.where(alike, hardness, rng.random(DOCUMENTS)) < share
        attacked = {case: own & (rng.random(DOCUMENTS) >= loss) for case in CELLS}
        forms = {case: Choices(np.where(hits, answers, 1 - answers)[None], answers) for case, hits in attacked.items()}
        pair.append(Measured(Choices(np.where(own, answers, 1 - answers)[None], answers), forms))
    return pair


def answer_verdicts(pair):
    comparisons = compare_models(*pair, Accuracy())
    (row,) = comparisons["attacks"]
    return {
        "clean": comparisons["clean"]["verdict"],
        "attacked": row["accuracy"]["verdict"],
        "difference": row["difference"]["verdict"],
    }


@pytest.mark.slow
@pytest.mark.once
def test_models_with_equal_answers_differ_in_at_most_one_of_twenty_draws():
    rng = np.random.default_rng(0)
    alarms = dict.fromkeys(("clean", "attacked", "difference"), 0)
    for _ in range(DRAWS):
        for what, verdict in answer_verdicts(draw_answers(rng)).items():
            alarms[what] += verdict != "not distinguishable"
    assert max(alarms.values()) <= 10, alarms


@pytest.mark.thorough
def test_better_answers_and_more_robust_answers_are_found():
    rng = np.random.default_rng(0)
    for _ in range(3):
        found = answer_verdicts(draw_answers(rng, right=(0.95, 0.5), losses=(0.1, 0.1)))
        assert (found["clean"], found["attacked"]) == ("better", "better")
        found = answer_verdicts(draw_answers(rng, losses=(0, 0.7)))
        assert (found["attacked"], found["difference"]) == ("better", "better")
        assert answer_verdicts(draw_answers(rng, right=(0.5, 0.95)))["clean"] == "worse"


def test_copies_are_never_distinguishable():
    one, _ = draw_pair(np.random.default_rng(0))
    assert set(verdicts([one, one]).values()) == {"not distinguishable"}
    one, _ = draw_answers(np.random.default_rng(0))
    assert set(answer_verdicts([one, one]).values()) == {"not distinguishable"}


def test_seeds_of_one_document_are_one_draw():
    """Ten times the same attack on a document says no more of other documents than once."""
    rng = np.random.default_rng(1)
    a, b = draw_pair(rng, sturdier=0.005)
    rows = []
    for seeds in (10, 1):
        cases = [AttackCase("aaa", 1, seed) for seed in range(seeds)]
        pair = [Measured(model.clean, dict.fromkeys(cases, model.attacked[CELLS[0]])) for model in (a, b)]
        rows += compare_models(*pair, Perplexity(NAMES))["attacks"]
    repeated, single = rows
    assert repeated["perplexity"]["low"] == pytest.approx(single["perplexity"]["low"])
    assert repeated["perplexity"]["high"] == pytest.approx(single["perplexity"]["high"])


@pytest.mark.parametrize("repeats", [3, 9])
def test_forms_that_are_the_same_have_the_p_value_of_one(repeats):
    """Their sums are several times as large as the clean text's, which the exchange of both must not see."""
    one, _ = draw_pair(np.random.default_rng(2), sturdier=0.24)  # an attack that does little
    ratios = []
    for number in (1, repeats):
        cases = [AttackCase("aaa", 1, seed) for seed in range(number)]
        measured = Measured(one.clean, dict.fromkeys(cases, one.attacked[CELLS[0]]))
        ratios.append(Perplexity(NAMES).attacked(measured, cases)["ratio"])
    assert 0.001 < ratios[0]["p_value"] < 0.9  # neither the least of 10,000 exchanges nor the most
    # Scaled sums round differently, by 1e-16 of their size.
    assert ratios[1] == pytest.approx(ratios[0])


def test_an_attack_that_leaves_half_of_the_tokens_is_seen_as_well():
    """Each token costs 0.1 nats more, and there are half as many."""
    rng = np.random.default_rng(0)
    tokens = 2 * (rng.lognormal(6.5, 0.6, DOCUMENTS).astype(np.int64) + 30)
    nats = 3.5 + 0.3 * rng.standard_normal(DOCUMENTS)
    attacked = text_scores(nats + 0.1 + 0.02 * rng.standard_normal(DOCUMENTS), tokens // 2)
    ratio = Perplexity(NAMES).attacked(Measured(text_scores(nats, tokens), {CELLS[0]: attacked}), CELLS[:1])["ratio"]
    assert ratio["p_value"] < 0.001  # all documents agree: of 10,000 exchanges, next to none is as far from 0
    assert ratio["verdict"] == "worse"


def test_pooled_forms_are_sums_by_document():
    one, other = (draw_pair(np.random.default_rng(seed))[0].clean for seed in (0, 1))
    both = pooled([one, other])
    np.testing.assert_array_equal(both.nll, one.nll + other.nll)
    np.testing.assert_array_equal(both.num_words, one.num_words + other.num_words)


def test_rows_are_each_severity_and_all_of_them_by_attack():
    cases = [
        AttackCase(attack, severity, seed) for attack in ("aaa", "keyboard") for severity in (1, 5) for seed in (0, 1)
    ]
    rows = [(group.attack, group.severity, len(group.cases)) for group in groups_of(cases)]
    assert rows == [
        ("aaa", 1, 2),
        ("aaa", 5, 2),
        ("aaa", None, 4),
        ("keyboard", 1, 2),
        ("keyboard", 5, 2),
        ("keyboard", None, 4),
    ]
    assert [group.severity for group in groups_of(cases[:2])] == [1]
