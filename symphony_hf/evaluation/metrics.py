"""Accuracy and GLUE's other metrics of a model's choices, with intervals over questions.

A metric is a function of sums over questions, so that it can be computed for many resamples at once, and for several
attacked forms of each question together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from symphony_hf.errors import EvaluationError

from .statistics import Interval, of_sums, paired_bootstrap


@dataclass(frozen=True, eq=False)
class Choices:
    """Chosen answers to questions in one or several forms.

    Attributes:
        chosen: Indices of the chosen answers. Shape: (forms, questions), integer.
        answers: Indices of the correct answers. Shape: (questions,), integer.
    """

    chosen: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class Metric:
    """A metric of choices.

    Attributes:
        name: Name in reports.
        counts: Function from choices and correct answers to counts of each question. Shape: (counts, ...), with the
            shape of the choices.
        value: Function from the sums of the counts to the metric.
    """

    name: str
    counts: Callable[[np.ndarray, np.ndarray], np.ndarray]
    value: Callable[..., np.ndarray]

    def columns(self, choices: Choices) -> list[np.ndarray]:
        """Return the counts of each question, as means over its forms. Shape of each: (questions,)."""
        return list(self.counts(choices.chosen, choices.answers).astype(np.float64).mean(axis=1))

    def of(self, choices: Choices) -> float:
        """Compute the metric over all questions."""
        return float(self.value(*(column.sum() for column in self.columns(choices))))


def pooled_choices(forms: list[Choices]) -> Choices:
    """Combine attacked forms of the same questions. A question stays one draw, however many forms it has."""
    return Choices(np.concatenate([form.chosen for form in forms]), forms[0].answers)


def _hits(chosen: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return np.stack([chosen == answers, np.ones_like(chosen)])


def _share(hits: np.ndarray, number: np.ndarray) -> np.ndarray:
    return hits / number


def _positives(chosen: np.ndarray, answers: np.ndarray) -> np.ndarray:
    right = np.broadcast_to(answers == 1, chosen.shape)
    return np.stack([(chosen == 1) & right, chosen == 1, right, np.ones_like(right)])


def _f1(hits: np.ndarray, chosen: np.ndarray, right: np.ndarray, number: np.ndarray) -> np.ndarray:
    return _ratio(2 * hits, chosen + right)


def _matthews(hits: np.ndarray, chosen: np.ndarray, right: np.ndarray, number: np.ndarray) -> np.ndarray:
    # Rounding may leave a product of zero a little below it.
    spread = np.clip(chosen * (number - chosen), 0, None) * np.clip(right * (number - right), 0, None)
    return _ratio(number * hits - chosen * right, np.sqrt(spread))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide, with 0 where the divisor is 0, as in scikit-learn."""
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=np.asarray(below) > 1e-9)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _hits, _share),
        Metric("f1", _positives, _f1),
        Metric("matthews", _positives, _matthews),
    )
}
"""Metrics by name. `f1` is that of answer 1, and `matthews` is Matthews' correlation; both are for two answers."""


def metric_interval(metric: Metric, choices: Choices, *, seed: int = 0) -> Interval:
    """Compute the 95% interval of one model's metric, a level without a verdict.

    Raises:
        EvaluationError: If there are fewer than 10 questions.
    """
    return paired_bootstrap(metric.columns(choices), of_sums(metric.value), seed=seed, null=None)


def compare_choices(metric: Metric, a: Choices, b: Choices, *, seed: int = 0) -> Interval:
    """Compute the 95% interval of the metric of `a` minus that of `b`: two models, or attacked and clean questions.

    Raises:
        EvaluationError: If the questions differ, or there are fewer than 10.
    """
    _check_pairs(a, b)
    first, second = metric.columns(a), metric.columns(b)
    number = len(first)

    def difference(*sums: Any) -> Any:
        return metric.value(*sums[:number]) - metric.value(*sums[number:])

    swapped = [(position, number + position) for position in range(number)]
    return paired_bootstrap([*first, *second], of_sums(difference), seed=seed, swapped=swapped)


def compare_changes(
    metric: Metric, clean_a: Choices, attacked_a: Choices, clean_b: Choices, attacked_b: Choices, *, seed: int = 0
) -> Interval:
    """Compute the 95% interval of the change of `a`'s metric under attack, attacked minus clean, minus that of `b`.

    A model that is better on clean questions is mostly better under attack too. This tells whether it also loses less.

    Raises:
        EvaluationError: If the questions differ, or there are fewer than 10.
    """
    for other in (attacked_a, clean_b, attacked_b):
        _check_pairs(clean_a, other)
    groups = [metric.columns(choices) for choices in (attacked_a, clean_a, attacked_b, clean_b)]
    number = len(groups[0])

    def difference(*sums: Any) -> Any:
        values = [metric.value(*sums[start : start + number]) for start in range(0, 4 * number, number)]
        return (values[0] - values[1]) - (values[2] - values[3])

    swapped = [(position, 2 * number + position) for position in range(2 * number)]
    columns = [column for group in groups for column in group]
    return paired_bootstrap(columns, of_sums(difference), seed=seed, swapped=swapped)


def _check_pairs(a: Choices, b: Choices) -> None:
    if not np.array_equal(a.answers, b.answers):
        raise EvaluationError("the choices are of different questions: score both on the same questions")
