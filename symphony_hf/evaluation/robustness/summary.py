"""Levels and comparisons of a robustness evaluation, row by row, from scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from symphony_hf.evaluation.clean_attacked import Measured, Scores
from symphony_hf.evaluation.settings import AttackCase

from .task import MetricReport


class Group(NamedTuple):
    """Attacked forms that are reported as one row: the seeds of one severity, or of all of them if it is None."""

    attack: str
    severity: int | None
    cases: list[AttackCase]


def groups_of(cases: Sequence[AttackCase]) -> list[Group]:
    """Return the rows of a report: each severity of each attack, and all severities together if there are several."""
    groups = []
    for attack in dict.fromkeys(case.attack for case in cases):
        own = [case for case in cases if case.attack == attack]
        severities = list(dict.fromkeys(case.severity for case in own))
        groups += [Group(attack, severity, [c for c in own if c.severity == severity]) for severity in severities]
        if len(severities) > 1:
            groups.append(Group(attack, None, own))
    return groups


def summarize(measured: Mapping[str, Measured[Scores]], report: MetricReport[Scores]) -> dict[str, Any]:
    """Return levels, and comparisons if there are two models.

    `measured` has the scores of `model`, and of `against` if there are two; `report` turns them into intervals.

    Returns:
        `measure`: how to read the rest, see `MetricReport`. `models` by role: `clean`, and `attacks`, a row for each
        group. For two models also `comparisons`, see `compare_models`.
    """
    models = {}
    for role, own in measured.items():
        groups = groups_of(list(own.attacked))
        attacks = [_labels(group) | report.attacked(own, group.cases) for group in _progress(groups, role)]
        models[role] = {"clean": report.clean(own.clean), "attacks": attacks}
    summary: dict[str, Any] = {"measure": report.describe(), "models": models}
    if "against" in measured:
        summary["comparisons"] = compare_models(measured["model"], measured["against"], report)
    return summary


def compare_models(a: Measured[Scores], b: Measured[Scores], report: MetricReport[Scores]) -> dict[str, Any]:
    """Compare two models on the same examples. Verdicts are about the first.

    Returns:
        `clean`: one level against the other. `attacks`: for each row, the same of attacked examples and of the changes.
        Each has a verdict. Further entries are those of the metric report.
    """
    groups = groups_of(list(a.attacked))
    rows = [_labels(group) | report.compare_attacked(a, b, group.cases) for group in _progress(groups, "both")]
    return {**report.comparison(a, b), "clean": report.as_entry(report.compare_clean(a, b)), "attacks": rows}


def _labels(group: Group) -> dict[str, Any]:
    return {"attack": group.attack, "severity": group.severity}


def _progress(groups: list[Group], what: str) -> Iterator[Group]:
    return iter(tqdm(groups, desc=f"Intervals of {what}", unit=" rows", delay=2, disable=None))
