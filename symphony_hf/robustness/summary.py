"""What the measurements say: levels with intervals for each model, and one model against the other."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..evaluation import (
    DocumentScores,
    Interval,
    compare_attacked,
    compare_perplexity,
    compare_robustness,
    perplexity_interval,
)
from .measure import Measured
from .plan import Cell
from .scores import TextScores, Unit, pooled

SEED = 0
"""Of the bootstrap."""


class Group(NamedTuple):
    """Cells that are reported as one row: the seeds of one severity, or of all of them.

    Attributes:
        attack: Its name.
        severity: From 1 to 5; None for all that were measured.
        cells: The attacked forms.
    """

    attack: str
    severity: int | None
    cells: list[Cell]


def groups_of(cells: Sequence[Cell]) -> list[Group]:
    """The rows of a report: each severity of each attack, and all severities together where there are several."""
    groups = []
    for attack in dict.fromkeys(cell.attack for cell in cells):
        own = [cell for cell in cells if cell.attack == attack]
        severities = list(dict.fromkeys(cell.severity for cell in own))
        groups += [Group(attack, severity, [c for c in own if c.severity == severity]) for severity in severities]
        if len(severities) > 1:
            groups.append(Group(attack, None, own))
    return groups


def summarize(measured: Mapping[str, Measured], names: list[str]) -> dict[str, Any]:
    """Levels, and comparisons where there are two models.

    Args:
        measured: By role: `model`, and `against` where there is one.
        names: Of the documents.

    Returns:
        `models` by role and, for two of them, `comparisons` of the first with the second, see `compare_models`.
    """
    groups = groups_of(list(measured["model"].attacked))
    rows = {role: list(_progress(_levels(own, groups, names), groups, role)) for role, own in measured.items()}
    clean = {role: _clean_level(own.clean, names) for role, own in measured.items()}
    summary: dict[str, Any] = {
        "models": {role: {"clean": clean[role], "attacks": rows[role]} for role in measured},
    }
    if "against" in measured:
        summary["comparisons"] = compare_models(measured["model"], measured["against"], names)
    return summary


def compare_models(a: Measured, b: Measured, names: list[str]) -> dict[str, Any]:
    """One model against another on the same documents.

    Args:
        a: The model that verdicts are about.
        b: The other one.
        names: Of the documents.

    Returns:
        `unit`: what likelihoods are divided by, words where the models divide text into different tokens. `clean`: the
        ratio of perplexities. `attacks`: for each row the ratio of perplexities on attacked text, the difference of
        the attacked/clean ratios, and the ratio on untouched tokens, None where the tokens differ.
    """
    unit: Unit = "token" if _same_tokens(a, b) else "word"
    clean = a.clean.per(unit, names), b.clean.per(unit, names)
    groups = groups_of(list(a.attacked))
    return {
        "unit": unit,
        "clean": _as_dict(compare_perplexity(*clean, seed=SEED, weights=a.clean.num_words).exp()),
        "attacks": list(_progress(_comparisons(a, b, groups, unit, names), groups, "both")),
    }


def _progress(rows: Iterator[dict[str, Any]], groups: Sequence[Group], what: str) -> Iterator[dict[str, Any]]:
    return iter(tqdm(rows, desc=f"Intervals of {what}", total=len(groups), unit=" rows", delay=2, disable=None))


def _same_tokens(a: Measured, b: Measured) -> bool:
    pairs = [(a.clean, b.clean), *((a.attacked[cell], b.attacked[cell]) for cell in a.attacked)]
    return all(np.array_equal(one.num_tokens, other.num_tokens) for one, other in pairs)


def _clean_level(clean: TextScores, names: list[str]) -> dict[str, Any]:
    return {"perplexity": _as_dict(perplexity_interval(clean.per("token", names), seed=SEED)), **_rates(clean, names)}


def _rates(scores: TextScores, names: list[str]) -> dict[str, float]:
    return {f"per_{unit}": scores.per(unit, names).perplexity for unit in ("word", "byte")}  # type: ignore[arg-type]


def _levels(measured: Measured, groups: Sequence[Group], names: list[str]) -> Iterator[dict[str, Any]]:
    clean, weights = measured.clean.per("token", names), measured.clean.num_words
    for group in groups:
        forms = {cell: measured.attacked[cell] for cell in group.cells}
        scores = pooled(list(forms.values()))
        attacked = scores.per("token", names)
        yield {
            "attack": group.attack,
            "severity": group.severity,
            "perplexity": _as_dict(perplexity_interval(attacked, seed=SEED)),
            **_rates(scores, names),
            "ratio": _as_dict(compare_attacked(clean, attacked, seed=SEED, weights=weights).exp()),
            "untouched": _untouched(scores, names, weights),
            "seeds": _by_seed(forms, names),
        }


def _by_seed(forms: Mapping[Cell, TextScores], names: list[str]) -> dict[str, float]:
    """Perplexity of each seed, over all severities of the group: how much hangs on the choice of words."""
    seeds = dict.fromkeys(cell.seed for cell in forms)
    own = {seed: pooled([form for cell, form in forms.items() if cell.seed == seed]) for seed in seeds}
    return {str(seed): form.per("token", names).perplexity for seed, form in own.items()}


def _untouched(scores: TextScores, names: list[str], weights: np.ndarray) -> dict[str, Any] | None:
    """None where the attack left no token alone."""
    if not scores.num_untouched.sum():
        return None
    clean, attacked = scores.untouched(names)
    return {
        "share": float(scores.num_untouched.sum() / scores.num_tokens.sum()),
        "clean_perplexity": clean.perplexity,
        "perplexity": attacked.perplexity,
        "ratio": _as_dict(compare_attacked(clean, attacked, seed=SEED, weights=weights).exp()),
    }


def _comparisons(
    a: Measured, b: Measured, groups: Sequence[Group], unit: Unit, names: list[str]
) -> Iterator[dict[str, Any]]:
    weights = a.clean.num_words
    for group in groups:
        ours, theirs = (pooled([own.attacked[cell] for cell in group.cells]) for own in (a, b))
        attacked = ours.per(unit, names), theirs.per(unit, names)
        clean = a.clean.per(unit, names), b.clean.per(unit, names)
        sturdier = compare_robustness(clean[0], attacked[0], clean[1], attacked[1], seed=SEED, weights=weights)
        yield {
            "attack": group.attack,
            "severity": group.severity,
            "perplexity": _as_dict(compare_perplexity(*attacked, seed=SEED, weights=weights).exp()),
            "ratio": _as_dict(sturdier),
            "untouched": _compared_untouched(ours, theirs, unit, names, weights),
        }


def _compared_untouched(
    ours: TextScores, theirs: TextScores, unit: Unit, names: list[str], weights: np.ndarray
) -> dict[str, Any] | None:
    if unit != "token" or not ours.num_untouched.sum():
        return None
    scores: tuple[DocumentScores, DocumentScores] = ours.untouched(names)[1], theirs.untouched(names)[1]
    return _as_dict(compare_perplexity(*scores, seed=SEED, weights=weights).exp())


def _as_dict(interval: Interval) -> dict[str, Any]:
    values = dataclasses.asdict(interval)
    return values if interval.null is None else values | {"verdict": interval.verdict()}
