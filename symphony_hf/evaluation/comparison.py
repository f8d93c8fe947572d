"""Paired comparison of two models on clean and attacked documents.

The intervals are over documents: they tell whether the same two checkpoints would compare alike on other documents of
this kind. How other training seeds would compare takes more training runs.
"""

from typing import Any

import numpy as np

from symphony_hf.errors import EvaluationError

from .perplexity import DocumentScores
from .statistics import Interval, of_sums, paired_bootstrap


def _paired_tokens(a: DocumentScores, b: DocumentScores) -> np.ndarray:
    if a.names != b.names:
        raise EvaluationError("the two models were scored on different documents: score both on the same ones")
    if not np.array_equal(a.num_tokens, b.num_tokens):
        raise EvaluationError(
            "the two models' documents have different numbers of tokens: nats per token compare only with one tokenizer"
        )
    return a.num_tokens


def _check_versions(clean: DocumentScores, attacked: DocumentScores) -> None:
    if clean.names != attacked.names:
        raise EvaluationError("clean and attacked documents have different names: score versions of the same documents")


def perplexity_interval(scores: DocumentScores, *, seed: int = 0) -> Interval:
    """Compute the 95% interval of one model's perplexity.

    Most of its width is the varying difficulty of documents, which models share: intervals of two models may overlap
    although their difference is clear. Compare models with `compare_perplexity`.

    Args:
        scores: Scores of one model.
        seed: Seed of the bootstrap.

    Returns:
        The interval of a level, which has no verdict.

    Raises:
        EvaluationError: If there are fewer than 10 documents, or a score is not finite.
    """
    mean = of_sums(lambda nll, tokens: nll / tokens)
    tokens = scores.num_tokens
    return paired_bootstrap((scores.nll, tokens), mean, seed=seed, weights=tokens, null=None).exp()


def compare_perplexity(
    a: DocumentScores, b: DocumentScores, *, seed: int = 0, weights: np.ndarray | None = None
) -> Interval:
    """Compute the 95% interval of the log-perplexity of `a` minus that of `b`, in nats per token.

    Args:
        a: Scores of one model.
        b: Scores of another model on the same documents.
        seed: Seed of the bootstrap.
        weights: See `paired_bootstrap`; each document's tokens when None.

    Returns:
        The interval, in nats; `.exp()` is that of the ratio of perplexities.

    Raises:
        EvaluationError: If the documents or their tokens differ, or there are fewer than 10 documents.
    """
    tokens = _paired_tokens(a, b)
    difference = of_sums(lambda nll_a, nll_b, tokens: nll_a / tokens - nll_b / tokens)
    weights = tokens if weights is None else weights
    return paired_bootstrap((a.nll, b.nll, tokens), difference, seed=seed, weights=weights, swapped=[(0, 1)])


def compare_attacked(
    clean: DocumentScores, attacked: DocumentScores, *, seed: int = 0, weights: np.ndarray | None = None
) -> Interval:
    """Compute the 95% interval of one model's log-perplexity on attacked documents minus that on clean ones.

    Args:
        clean: Scores of a model on the clean documents.
        attacked: Its scores on the attacked versions of the same documents, which may have other numbers of tokens.
        seed: Seed of the bootstrap.
        weights: See `paired_bootstrap`; each document's tokens when None.

    Returns:
        The interval, in nats; `.exp()` is that of the attacked/clean ratio.

    Raises:
        EvaluationError: If the documents differ, or there are fewer than 10.
    """
    _check_versions(clean, attacked)
    difference = of_sums(lambda nll_a, num_a, nll, num: nll_a / num_a - nll / num)
    # The exchange test swaps a document's versions, which must count alike: pooled attacks have several times the
    # tokens of the clean text, and dropped words fewer. A common factor leaves the statistic as it is.
    scale = clean.num_tokens.sum() / attacked.num_tokens.sum()
    columns = (scale * attacked.nll, scale * attacked.num_tokens, clean.nll, clean.num_tokens)
    weights = clean.num_tokens if weights is None else weights
    return paired_bootstrap(columns, difference, seed=seed, weights=weights, swapped=[(0, 2), (1, 3)])


def compare_robustness(
    clean_a: DocumentScores,
    attacked_a: DocumentScores,
    clean_b: DocumentScores,
    attacked_b: DocumentScores,
    *,
    seed: int = 0,
    weights: np.ndarray | None = None,
) -> Interval:
    """Compute the 95% interval of the ratio of attacked to clean perplexity of `a` minus that of `b`.

    A model that is better on clean text is mostly better under attack too. This tells whether it also loses less.

    Args:
        clean_a: Scores of one model on the clean documents.
        attacked_a: Its scores on the attacked versions of the same documents.
        clean_b: Scores of another model on the clean documents.
        attacked_b: Its scores on the attacked versions.
        seed: Seed of the bootstrap.
        weights: See `paired_bootstrap`; each document's tokens when None.

    Raises:
        EvaluationError: If the documents or their tokens differ, or there are fewer than 10 documents.
    """
    clean_tokens = _paired_tokens(clean_a, clean_b)
    attacked_tokens = _paired_tokens(attacked_a, attacked_b)
    _check_versions(clean_a, attacked_a)

    def difference(clean: Any, attacked: Any, *nll: Any) -> Any:
        nll_clean_a, nll_attacked_a, nll_clean_b, nll_attacked_b = nll
        ratio_a = np.exp(nll_attacked_a / attacked - nll_clean_a / clean)
        return ratio_a - np.exp(nll_attacked_b / attacked - nll_clean_b / clean)

    columns = (clean_tokens, attacked_tokens, clean_a.nll, attacked_a.nll, clean_b.nll, attacked_b.nll)
    weights = clean_tokens if weights is None else weights
    return paired_bootstrap(columns, of_sums(difference), seed=seed, weights=weights, swapped=[(2, 4), (3, 5)])
