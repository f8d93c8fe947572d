"""The reader of what `symphony eval` wrote."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..diagnostics.names import short_names
from ..evaluation import Interval
from ..robustness import verdicts
from .commands import command_line
from .intervals import as_interval, is_interval
from .runs import AttackRow, Comparison, Level, Run, flat
from .tables import show, show_interval

_WHAT = {
    "perplexity": "ratio of perplexities",
    "accuracy": "difference of accuracies",
    "ratio": "difference of attacked / clean",
    "difference": "difference of attacked - clean",
    "untouched": "ratio on untouched tokens",
}
_CHANGES = ("ratio", "difference")
"""Entries of a row that compare attacked with clean input; what else is an interval was measured of one of them."""
_NO_DIFFERENCE = frozenset({"model", "against", "output", "batch_size"})
"""Settings that say nothing on what was measured, or that the page shows elsewhere."""


def read_evaluation(folder: Path, result: Mapping[str, Any]) -> Run:
    """A folder with `result.json` that has `models`."""
    models = {role: result["models"][role] for role in ("model", "against") if role in result["models"]}
    labels = _labels(result["settings"], list(models))
    levels = [level for role, model in models.items() for level in _levels(labels[role], model["clean"])]
    attacks = [row for role, model in models.items() for row in _attacks(labels[role], model)]
    compared = result.get("comparisons")
    named = {**result, "settings": {**result["settings"], **labels}}
    documents = result["documents"]
    return Run(
        folder=folder,
        kind="evaluation",
        about=f"{' against '.join(labels.values())}, {documents['number']} documents of {documents['source']}",
        findings=verdicts(named) if compared else list(_told(levels, attacks)),
        settings=flat({k: v for k, v in result["settings"].items() if k not in _NO_DIFFERENCE} | {"on": documents}),
        levels=levels,
        attacks=attacks,
        comparisons=[] if compared is None else list(_comparisons(compared, labels)),
        seconds=float(result["seconds"]),
        versions=result["versions"],
        command=command_line("eval", result["settings"]),
    )


def _labels(settings: Mapping[str, Any], roles: list[str]) -> dict[str, str]:
    """What the models are called, by role."""
    names = dict(zip(roles, short_names([str(settings[role]) for role in roles]), strict=True))
    if len(set(names.values())) == len(names):
        return names
    return {role: f"{name} ({role})" for role, name in names.items()}  # two revisions of one


def _metrics(values: Mapping[str, Any]) -> dict[str, Interval]:
    """What was measured of one form of the input, `perplexity` say."""
    return {name: as_interval(value) for name, value in values.items() if is_interval(value) and name not in _CHANGES}


def _levels(label: str, clean: Mapping[str, Any]) -> Iterator[Level]:
    for metric, interval in _metrics(clean).items():
        ends = interval.low, interval.high
        yield Level(label, metric, "clean", interval.estimate, *ends, interval.num_documents)


def _attacks(label: str, model: Mapping[str, Any]) -> Iterator[AttackRow]:
    for row in model["attacks"]:
        change = next((row[name] for name in _CHANGES if is_interval(row.get(name))), None)
        untouched = row.get("untouched")
        for metric, interval in _metrics(row).items():
            yield AttackRow(
                label,
                str(row["attack"]),
                row["severity"],
                metric,
                interval,
                None if change is None else as_interval(change),
                as_interval(untouched["ratio"]) if untouched else None,
            )


def _comparisons(compared: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Comparison]:
    first, second = labels["model"], labels["against"]
    clean = compared["clean"]
    level = "accuracy" if clean["null"] == 0 else "perplexity"  # a difference, or a ratio
    yield Comparison(first, second, "clean", _WHAT[level], as_interval(clean), clean["verdict"], headline=True)
    overall = {row["attack"]: row for row in compared["attacks"]}  # the last: all severities together
    for row in compared["attacks"]:
        severity = "all severities" if row["severity"] is None else f"severity {row['severity']}"
        for name, value in row.items():
            if is_interval(value) and "verdict" in value:
                text, told = f"{row['attack']}, {severity}", row is overall[row["attack"]] and name != "untouched"
                what = _WHAT.get(name, name)
                yield Comparison(first, second, text, what, as_interval(value), value["verdict"], headline=told)


def _told(levels: list[Level], attacks: list[AttackRow]) -> Iterator[str]:
    """Of one model alone: what it was, and what an attack makes of it."""
    for level in levels:
        shown, low, high = (
            show(value, level.metric) for value in (level.value, level.low, level.high) if value is not None
        )
        yield f"On clean input, {level.metric} {shown} [{low}, {high}]."
    for row in {(row.attack, row.metric): row for row in attacks}.values():  # the last: all severities together
        times = "" if row.change is None else f"; against clean input {show_interval(row.change)}"
        yield f"Under {row.attack}, {row.metric} {show(row.value.estimate, row.metric)}{times}."
