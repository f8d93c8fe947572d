"""Intervals of perplexities and accuracies: of one model, clean and attacked, and of one model against another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from symphony_hf.evaluation.clean_attacked import Measured
from symphony_hf.evaluation.comparison import (
    compare_attacked,
    compare_perplexity,
    compare_robustness,
    perplexity_interval,
)
from symphony_hf.evaluation.metrics import (
    METRICS,
    Choices,
    compare_changes,
    compare_choices,
    metric_interval,
    pooled_choices,
)
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS, Interval

from .task import MetricReport
from .text_scores import TextScores, Unit, pooled

SEED = 0
"""Seed of the bootstrap."""


class Perplexity(MetricReport[TextScores]):
    """Report of perplexities, in which changes are ratios of attacked to clean, and models are compared by ratios.

    `comparison` has the `unit` that two models' likelihoods are divided by: words if their tokens differ, and bytes if
    the text has no spaces besides. Rows also have `per_word`, None for such text, `per_byte`, and `untouched`: the
    metrics on the tokens that the attack leaves alone, None if fewer than 10 documents have any, or if two models'
    tokens differ.
    """

    level, change, lower_is_better = "perplexity", "ratio", True

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def clean(self, scores: TextScores) -> dict[str, Any]:
        """Return the perplexity per token, per word and per byte."""
        level = perplexity_interval(scores.per("token", self.names), seed=SEED)
        return {"perplexity": self.as_entry(level), **self._rates(scores)}

    def attacked(self, measured: Measured[TextScores], cases: Sequence[AttackCase]) -> dict[str, Any]:
        """Return the same with the ratio to clean text, also on untouched tokens."""
        clean, weights = measured.clean.per("token", self.names), measured.clean.sizes
        forms = {case: measured.attacked[case] for case in cases}
        scores = pooled(list(forms.values()))
        attacked = scores.per("token", self.names)
        return {
            "perplexity": self.as_entry(perplexity_interval(attacked, seed=SEED)),
            **self._rates(scores),
            "ratio": self.as_entry(compare_attacked(clean, attacked, seed=SEED, weights=weights).exp()),
            "untouched": self._untouched(scores, weights),
            "seeds": self._by_seed(forms),
        }

    def comparison(self, a: Measured[TextScores], b: Measured[TextScores]) -> dict[str, Any]:
        """Return the unit."""
        return {"unit": _unit_of(a, b)}

    def compare_clean(self, a: Measured[TextScores], b: Measured[TextScores]) -> Interval:
        """Return the ratio of perplexities."""
        pair = [measured.clean.per(_unit_of(a, b), self.names) for measured in (a, b)]
        return compare_perplexity(*pair, seed=SEED, weights=a.clean.sizes).exp()

    def compare_attacked(
        self, a: Measured[TextScores], b: Measured[TextScores], cases: Sequence[AttackCase]
    ) -> dict[str, Any]:
        """Return the ratio of perplexities on attacked text and on its untouched tokens, and the difference of the
        attacked/clean ratios."""
        unit, weights = _unit_of(a, b), a.clean.sizes
        ours, theirs = (pooled([own.attacked[case] for case in cases]) for own in (a, b))
        attacked = ours.per(unit, self.names), theirs.per(unit, self.names)
        clean = a.clean.per(unit, self.names), b.clean.per(unit, self.names)
        sturdier = compare_robustness(clean[0], attacked[0], clean[1], attacked[1], seed=SEED, weights=weights)
        untouched, has = None, ours.num_untouched > 0
        # One tokenizer without offsets and one with them may find other tokens untouched.
        are_same = unit == "token" and np.array_equal(ours.num_untouched, theirs.num_untouched)
        if are_same and has.sum() >= MIN_DOCUMENTS:
            pair = ours.untouched(self.names)[1], theirs.untouched(self.names)[1]
            untouched = self.as_entry(compare_perplexity(*pair, seed=SEED, weights=weights[has]).exp())
        return {
            "perplexity": self.as_entry(compare_perplexity(*attacked, seed=SEED, weights=weights).exp()),
            "ratio": self.as_entry(sturdier),
            "untouched": untouched,
        }

    def _rates(self, scores: TextScores) -> dict[str, float | None]:
        return {
            "per_word": scores.per("word", self.names).perplexity if scores.has_words else None,
            "per_byte": scores.per("byte", self.names).perplexity,
        }

    def _by_seed(self, forms: Mapping[AttackCase, TextScores]) -> dict[str, float]:
        """Return the perplexity of each seed over all severities of the group."""
        seeds = dict.fromkeys(case.seed for case in forms)
        own = {seed: pooled([form for case, form in forms.items() if case.seed == seed]) for seed in seeds}
        return {str(seed): form.per("token", self.names).perplexity for seed, form in own.items()}

    def _untouched(self, scores: TextScores, weights: np.ndarray) -> dict[str, Any] | None:
        """Return the metrics on untouched tokens; None if too few documents have any for an interval."""
        has = scores.num_untouched > 0
        if has.sum() < MIN_DOCUMENTS:
            return None
        clean, attacked = scores.untouched(self.names)
        return {
            "share": float(scores.num_untouched.sum() / scores.num_tokens.sum()),
            "clean_perplexity": clean.perplexity,
            "perplexity": attacked.perplexity,
            "ratio": self.as_entry(compare_attacked(clean, attacked, seed=SEED, weights=weights[has]).exp()),
        }


def _unit_of(a: Measured[TextScores], b: Measured[TextScores]) -> Unit:
    forms = [(a.clean, b.clean), *((a.attacked[case], b.attacked[case]) for case in a.attacked)]
    if all(one.tokens == other.tokens for one, other in forms):
        return "token"
    return "word" if all(one.has_words for one, _ in forms) else "byte"


class Accuracy(MetricReport[Choices]):
    """Report of accuracies, in which changes and comparisons of models are differences.

    Rows have other metrics of `evaluation.metrics.METRICS` in `also`, by name, each with `level` and `difference`.
    """

    level, change, lower_is_better = "accuracy", "difference", False

    def __init__(self, also: Sequence[str] = ()) -> None:
        self.also = tuple(also)

    def clean(self, scores: Choices) -> dict[str, Any]:
        """Return accuracy and other metrics."""
        levels = {name: self.as_entry(metric_interval(METRICS[name], scores, seed=SEED)) for name in self._names()}
        also = {name: {"level": level} for name, level in levels.items() if name in self.also}
        return {"accuracy": levels["accuracy"], "also": also}

    def attacked(self, measured: Measured[Choices], cases: Sequence[AttackCase]) -> dict[str, Any]:
        """Return the same with the difference to clean questions."""
        attacked = _together(measured, cases)
        rows = {}
        for name in self._names():
            metric = METRICS[name]
            rows[name] = {
                "level": self.as_entry(metric_interval(metric, attacked, seed=SEED)),
                "difference": self.as_entry(compare_choices(metric, attacked, measured.clean, seed=SEED)),
            }
        return self._row(rows) | {"seeds": self._by_seed(measured, cases)}

    def comparison(self, a: Measured[Choices], b: Measured[Choices]) -> dict[str, Any]:
        """Return `also`: the differences of other metrics on clean questions."""
        compared = {name: compare_choices(METRICS[name], a.clean, b.clean, seed=SEED) for name in self.also}
        return {"also": {name: self.as_entry(interval) for name, interval in compared.items()}}

    def compare_clean(self, a: Measured[Choices], b: Measured[Choices]) -> Interval:
        """Return the difference of accuracies."""
        return compare_choices(METRICS["accuracy"], a.clean, b.clean, seed=SEED)

    def compare_attacked(
        self, a: Measured[Choices], b: Measured[Choices], cases: Sequence[AttackCase]
    ) -> dict[str, Any]:
        """Return the differences of accuracies on attacked questions, and of their changes under attack."""
        ours, theirs = _together(a, cases), _together(b, cases)
        rows = {}
        for name in self._names():
            metric = METRICS[name]
            changes = compare_changes(metric, a.clean, ours, b.clean, theirs, seed=SEED)
            rows[name] = {
                "level": self.as_entry(compare_choices(metric, ours, theirs, seed=SEED)),
                "difference": self.as_entry(changes),
            }
        return self._row(rows)

    def _names(self) -> tuple[str, ...]:
        return ("accuracy", *self.also)

    def _row(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        first = rows.pop("accuracy")
        return {"accuracy": first["level"], "difference": first["difference"], "also": rows}

    def _by_seed(self, measured: Measured[Choices], cases: Sequence[AttackCase]) -> dict[str, float]:
        """Return the accuracy of each seed over all severities of the group."""
        seeds = dict.fromkeys(case.seed for case in cases)
        own = {seed: _together(measured, [case for case in cases if case.seed == seed]) for seed in seeds}
        return {str(seed): METRICS["accuracy"].of(choices) for seed, choices in own.items()}


def _together(measured: Measured[Choices], cases: Sequence[AttackCase]) -> Choices:
    return pooled_choices([measured.attacked[case] for case in cases])
