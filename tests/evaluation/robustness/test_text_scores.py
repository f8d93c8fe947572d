"""Likelihoods of documents in one form: by the words that the form has, and on the documents that have tokens left."""

import numpy as np
import pytest

from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.comparison import compare_robustness, perplexity_interval
from symphony_hf.evaluation.perplexity import DocumentScores
from symphony_hf.evaluation.robustness.text_scores import TextScores
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
