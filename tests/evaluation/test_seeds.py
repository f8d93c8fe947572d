"""Intervals over seeds, against tables and by hand."""

import math

import pytest

from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.statistics import t_interval


def test_the_interval_is_student_s():
    interval = t_interval([1.0, 2.0, 3.0])
    # Standard deviation 1; t of 2 degrees of freedom, two-sided 95%, from any table.
    assert interval.estimate == 2
    assert interval.low == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)
    assert interval.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert interval.excludes(5)
    assert not interval.excludes(0)
    wider = t_interval([1.0, 2.0, 3.0], confidence=0.99)
    assert wider.high == pytest.approx(2 + 9.925 / math.sqrt(3), abs=1e-3)


def test_the_exponential_of_equal_differences_is_exact():
    interval = t_interval([math.log(0.9)] * 3).exp()
    assert interval.estimate == pytest.approx(0.9)
    assert interval.low == pytest.approx(0.9)
    assert interval.high == pytest.approx(0.9)
    assert interval.excludes(1)


def test_one_seed_excludes_nothing():
    interval = t_interval([4.0])
    assert (interval.estimate, interval.low, interval.high) == (4.0, None, None)
    assert not interval.excludes(100)
    assert interval.exp().low is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_missing_or_infinite_values_are_refused(values):
    with pytest.raises(EvaluationError, match="one finite value per seed"):
        t_interval(values)
