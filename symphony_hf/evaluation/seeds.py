"""Confidence intervals over the seeds of whole training runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import EvaluationError


@dataclass(frozen=True)
class SeedInterval:
    """A mean over seeds, with the t-interval of it.

    Attributes:
        estimate: The mean.
        low: None with one seed, which says nothing of the spread; likewise `high`.
        high: See `low`.
        num_seeds: Runs.
        confidence: Of the interval.
    """

    estimate: float
    low: float | None
    high: float | None
    num_seeds: int
    confidence: float

    def exp(self) -> "SeedInterval":
        """Of exp(estimate): a ratio, from a difference of logarithms."""
        low, high = (None if end is None else math.exp(end) for end in (self.low, self.high))
        return SeedInterval(math.exp(self.estimate), low, high, self.num_seeds, self.confidence)

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside of the interval; with one seed none does."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def t_interval(values: Sequence[float], confidence: float = 0.95) -> SeedInterval:
    """The mean of one value a seed, and its t-interval.

    Args:
        values: Independent but for what they share by design: give differences, where runs are paired by seed.
        confidence: Above 0 and below 1.

    Raises:
        EvaluationError: If there is no value, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise EvaluationError(f"an interval over seeds needs one finite value a seed, got {list(values)}")
    mean = float(array.mean())
    if len(array) == 1:
        return SeedInterval(mean, None, None, 1, confidence)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return SeedInterval(mean, mean - half, mean + half, len(array), confidence)


def paired_ratio(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> SeedInterval:
    """The geometric mean of values over others, paired by seed.

    Args:
        values: Positive, one a seed.
        others: Of the same seeds, in the same order.
        confidence: Above 0 and below 1.

    Raises:
        EvaluationError: If there are no pairs, or a value is not positive.
    """
    if len(values) != len(others) or min([*values, *others], default=0) <= 0:
        raise EvaluationError(f"ratios need pairs of positive values, got {list(values)} and {list(others)}")
    return t_interval([math.log(a / b) for a, b in zip(values, others, strict=True)], confidence).exp()
