"""Likelihoods of documents in one form: by the words that the form has, and on the documents that have tokens left."""

import dataclasses

import numpy as np
import pytest

from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.clean_attacked import Measured
from symphony_hf.evaluation.comparison import compare_perplexity, compare_robustness, perplexity_interval
from symphony_hf.evaluation.perplexity import DocumentScores
from symphony_hf.evaluation.robustness.metric_reports import Perplexity
from symphony_hf.evaluation.robustness.text_scores import TextScores
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.statistics import Interval, of_sums, paired_bootstrap

NAMES = [str(number) for number in range(20)]


def scores(nats_per_word, words, untouched=None):
    """A form in which each word has two tokens."""
    words = np.full(20, words)
    untouched = words if untouched is None else untouched
    return TextScores(nats_per_word * words, 2 * words, words, 5 * words, 1.0 * untouched, 1.0 * untouched, untouched)


def test_half_of_the_words_dropped_is_not_half_of_the_loss():
    """Both models lose a nat for each word that is there, so neither is sturdier."""
    clean_a, clean_b = scores(7.0, 40).per("word", NAMES), scores(8.0, 40).per("word", NAMES)
    dropped_a, dropped_b = scores(8.0, 20).per("word", NAMES), scores(9.0, 20).per("word", NAMES)
    assert dropped_a.perplexity / clean_a.perplexity == pytest.approx(np.e)
    difference = compare_robustness(clean_a, dropped_a, clean_b, dropped_b)
    assert difference.estimate == pytest.approx(0.0, abs=1e-12)


def test_documents_without_an_untouched_token_are_left_out():
    untouched = np.array([3] * 12 + [0] * 8)
    for part in scores(7.0, 40, untouched).untouched(NAMES):
        assert part.names == NAMES[:12]
        assert part.num_tokens.tolist() == [3] * 12


def test_untouched_tokens_of_few_documents_have_no_interval():
    report, case, rows = Perplexity(NAMES), AttackCase("aaa", 1, 0), {}
    for kept, words_of_others in ((9, 40), (10, 40), (10, 4000)):
        words = np.array([40, 80] * (kept // 2) + [40] * (kept % 2) + [words_of_others] * (20 - kept))
        untouched = np.where(np.arange(20) < kept, 3 + np.arange(20) % 5, 0)
        attacked = dataclasses.replace(scores(8.0, words, untouched), untouched_nll=untouched * (1 + np.arange(20) % 3))
        measured = Measured(scores(7.0, words), {case: attacked})
        alone, pair = report.attacked(measured, [case]), report.compare_attacked(measured, measured, [case])
        rows[kept, words_of_others] = alone["untouched"] and alone["untouched"]["ratio"], pair["untouched"]
    assert rows[9, 40] == (None, None)
    assert [row["num_documents"] for row in rows[10, 40]] == [10, 10]
    assert rows[10, 40] == rows[10, 4000]  # documents without untouched tokens have no weight


def test_text_without_spaces_is_compared_by_bytes():
    """2,000 nats per line of Chinese: exp of it overflows."""
    lines = [
        dataclasses.replace(scores(nats, 10), num_bytes=np.full(20, 9000), num_tokens=np.full(20, 3000))
        for nats in (2000.0, 2100.0)
    ]
    a, b = (Measured(dataclasses.replace(line, tokens=name), {}) for name, line in zip("ab", lines, strict=True))
    report = Perplexity(NAMES)
    assert report.clean(a.clean)["per_word"] is None
    assert report.comparison(a, b) == {"unit": "byte"}
    assert report.compare_clean(a, b).estimate == pytest.approx(np.exp(-100 * 10 / 9000))


def test_documents_without_spaces_weigh_by_their_bytes():
    """By their lines, two documents that are nearly all of the text would count like the others."""
    size = np.array([30_000] * 2 + [300] * 18)
    nats = np.random.default_rng(0).normal(2.0, 0.1, (2, 20)) * size
    a, b = (
        Measured(dataclasses.replace(scores(1.0, 1), nll=own, num_bytes=size, num_tokens=size, tokens="t"), {})
        for own in nats
    )
    found = Perplexity(NAMES).compare_clean(a, b)
    pair = [DocumentScores(NAMES, own, size) for own in nats]
    assert found == compare_perplexity(*pair, weights=size).exp()
    assert found != compare_perplexity(*pair, weights=np.ones(20)).exp()


def test_an_interval_without_ends_has_no_verdict():
    with pytest.raises(EvaluationError, match="without finite ends"):
        Interval(1.0, float("nan"), float("nan"), 0.95, 20, 0).verdict()


def test_the_interval_of_a_level_takes_uneven_documents_into_account():
    """Two long documents count for as much as their tokens: few documents, and a wider interval."""
    tokens = np.array([1000] * 2 + [20] * 18)
    nll = np.random.default_rng(0).normal(3.0, 0.5, 20) * tokens
    mean = of_sums(lambda nll, tokens: nll / tokens)
    as_if_even = paired_bootstrap((nll, tokens), mean, seed=0, null=None)
    interval = perplexity_interval(DocumentScores(NAMES, nll, tokens))
    assert np.log(interval.high / interval.low) > 1.1 * (as_if_even.high - as_if_even.low)
