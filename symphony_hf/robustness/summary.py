"""What the measurements say: levels with intervals for each model, and one model against the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from .plan import Cell
from .task import Measured, Scale, Scores


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


def summarize(measured: Mapping[str, Measured[Scores]], scale: Scale[Scores]) -> dict[str, Any]:
    """Levels, and comparisons where there are two models.

    Args:
        measured: By role: `model`, and `against` where there is one.
        scale: Of the scores.

    Returns:
        `measure`: how to read the rest, see `Scale`. `models` by role: `clean`, and `attacks`, a row for each group.
        For two models also `comparisons`, see `compare_models`.
    """
    models = {}
    for role, own in measured.items():
        groups = groups_of(list(own.attacked))
        attacks = [_labels(group) | scale.attacked(own, group.cells) for group in _progress(groups, role)]
        models[role] = {"clean": scale.clean(own.clean), "attacks": attacks}
    summary: dict[str, Any] = {"measure": scale.told(), "models": models}
    if "against" in measured:
        summary["comparisons"] = compare_models(measured["model"], measured["against"], scale)
    return summary


def compare_models(a: Measured[Scores], b: Measured[Scores], scale: Scale[Scores]) -> dict[str, Any]:
    """One model against another on the same examples.

    Args:
        a: The model that verdicts are about.
        b: The other one.
        scale: Of the scores.

    Returns:
        `clean`: one level against the other. `attacks`: for each row the same of attacked examples, and of the
        changes. Each has a verdict. More as the scale has it.
    """
    groups = groups_of(list(a.attacked))
    rows = [_labels(group) | scale.compare_attacked(a, b, group.cells) for group in _progress(groups, "both")]
    return {**scale.comparison(a, b), "clean": scale.as_entry(scale.compare_clean(a, b)), "attacks": rows}


def _labels(group: Group) -> dict[str, Any]:
    return {"attack": group.attack, "severity": group.severity}


def _progress(groups: list[Group], what: str) -> Iterator[Group]:
    return iter(tqdm(groups, desc=f"Intervals of {what}", unit=" rows", delay=2, disable=None))
