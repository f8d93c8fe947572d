"""Readers of the results of `symphony eval` and `symphony routing`."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from symphony_hf.diagnostics.labels import model_names, short_names
from symphony_hf.evaluation.robustness.settings import RobustnessSettings
from symphony_hf.evaluation.robustness.tables import verdicts
from symphony_hf.evaluation.routing.pictures import captioned
from symphony_hf.evaluation.routing.settings import RoutingSettings
from symphony_hf.evaluation.routing.tables import findings, layer_rows
from symphony_hf.evaluation.statistics import Interval
from symphony_hf.settings import command_line

from .runs import AttackRow, Comparison, Level, Run, as_interval, flat, is_interval
from .tables import show, show_interval

_OPTIONS = {"attacks": "attack", "severities": "severity"}
"""Option names that differ from their settings' names."""


def _given(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are set. A None that is not the default is `all`, as on the command line."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    unset = {name for name, value in settings.items() if value is None}
    return {
        name: "all" if name in unset else value
        for name, value in settings.items()
        if name not in unset or defaults.get(name) is not None
    }


def _command_of(command: str, settings: Mapping[str, Any]) -> str:
    """Return the command line with these settings."""
    named = settings.get("against") or []  # one model for eval, several for routing
    models = [named] if isinstance(named, str) else named
    against = [word for model in models for word in ("--against", model)]
    options = {
        _OPTIONS.get(name, name): value
        for name, value in settings.items()
        if name not in ("model", "against") and value != []
    }
    if settings.get("attacks") == []:
        options["attack"] = "none"  # without the option the default attack would run
    return command_line(command, str(settings["model"]), *against, **options)


_WHAT = {
    "perplexity": "ratio of perplexities per {unit}",
    "accuracy": "difference of accuracies",
    "ratio": "difference of attacked / clean per {unit}",
    "difference": "difference of attacked - clean",
    "untouched": "ratio of perplexities per token, on untouched tokens",
}
_CHANGES = ("ratio", "difference")
"""Entries of a row that compare attacked with clean inputs; its other intervals are levels."""
_NO_DIFFERENCE = frozenset({"model", "against", "output", "batch_size"})
"""Settings that do not affect the result, or that the page shows elsewhere."""


def read_evaluation(folder: Path, result: Mapping[str, Any]) -> Run:
    """Read a folder whose `result.json` has `models`."""
    models = {role: result["models"][role] for role in ("model", "against") if role in result["models"]}
    labels, settings = model_names(result["settings"], list(models)), _given(RobustnessSettings, result["settings"])
    documents = result["documents"]
    unit = str(documents["unit"])
    levels = [level for role, model in models.items() for level in _levels(labels[role], model["clean"], unit)]
    attacks = [row for role, model in models.items() for row in _attacks(labels[role], model)]
    compared = result.get("comparisons")
    on = f"{documents['number']} {unit} of {documents['source']}"
    return Run(
        folder=folder,
        kind="evaluation",
        about=f"{' against '.join(labels.values())}, {on}",
        findings=verdicts(result) if compared else list(_describe(levels, attacks)),
        settings=flat({k: v for k, v in settings.items() if k not in _NO_DIFFERENCE} | {"on": documents}),
        levels=levels,
        attacks=attacks,
        comparisons=[] if compared is None else list(_comparisons(compared, labels)),
        seconds=float(result["seconds"]),
        versions=result["versions"],
        command=_command_of("eval", settings),
    )


def _metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, Interval, Interval | None]]:
    """Yield each metric measured on one form of the input, such as `perplexity`, and its change from the clean form."""
    change = next((values[name] for name in _CHANGES if is_interval(values.get(name))), None)
    for name, value in values.items():
        if is_interval(value) and name not in _CHANGES:
            yield name, as_interval(value), None if change is None else as_interval(change)
    for name, own in values.get("also", {}).items():
        yield name, as_interval(own["level"]), as_interval(own["difference"]) if "difference" in own else None


def _levels(label: str, clean: Mapping[str, Any], unit: str) -> Iterator[Level]:
    for metric, interval, _ in _metrics(clean):
        ends = interval.low, interval.high
        yield Level(label, metric, "clean", interval.estimate, *ends, interval.num_documents, unit)


def _attacks(label: str, model: Mapping[str, Any]) -> Iterator[AttackRow]:
    for row in model["attacks"]:
        untouched = as_interval(row["untouched"]["ratio"]) if row.get("untouched") else None
        for metric, interval, change in _metrics(row):
            yield AttackRow(label, str(row["attack"]), row["severity"], metric, interval, change, untouched)


def _comparisons(compared: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Comparison]:
    first, second = labels["model"], labels["against"]
    clean = compared["clean"]
    level = "accuracy" if clean["null"] == 0 else "perplexity"  # a difference, or a ratio
    in_words = {name: what.format(unit=compared.get("unit", "token")) for name, what in _WHAT.items()}
    yield Comparison(first, second, "clean", in_words[level], as_interval(clean), clean["verdict"], headline=True)
    for name, value in compared.get("also", {}).items():
        yield Comparison(first, second, "clean", f"difference of {name}", as_interval(value), value["verdict"])
    overall = {row["attack"]: row for row in compared["attacks"]}  # the last row: all severities together
    for row in compared["attacks"]:
        severity = "all severities" if row["severity"] is None else f"severity {row['severity']}"
        text = f"{row['attack']}, {severity}"
        for name, value in row.items():
            if is_interval(value) and "verdict" in value:
                headline = row is overall[row["attack"]] and name != "untouched"
                what = in_words.get(name, name)
                yield Comparison(first, second, text, what, as_interval(value), value["verdict"], headline=headline)
        for name, own in row.get("also", {}).items():
            for what, value in ((name, own["level"]), (f"attacked - clean, {name}", own["difference"])):
                what = f"difference of {what}"
                yield Comparison(first, second, text, what, as_interval(value), value["verdict"])


def _describe(levels: list[Level], attacks: list[AttackRow]) -> Iterator[str]:
    """Yield findings for a single model: its levels, clean and under attack."""
    for level in levels:
        shown, low, high = (
            show(value, level.metric) for value in (level.value, level.low, level.high) if value is not None
        )
        yield f"On clean input, {level.metric} {shown} [{low}, {high}]."
    for row in {(row.attack, row.metric): row for row in attacks}.values():  # the last: all severities together
        times = "" if row.change is None else f"; against clean input {show_interval(row.change)}"
        yield f"Under {row.attack}, {row.metric} {show(row.value.estimate, row.metric)}{times}."


def read_routing(folder: Path, result: Mapping[str, Any]) -> Run:
    """Read a folder whose `result.json` has `layers`, with its pictures."""
    settings, overall = _given(RoutingSettings, result["settings"]), result["overall"]
    summary = (
        f"Normalized load entropy {overall['load_entropy']:.3f}, dead experts {overall['dead_experts']:.1%}, as means "
        f"over {len(result['routers'])} layers."
    )
    (model,) = short_names([str(settings["model"])])
    return Run(
        folder=folder,
        kind="routing diagnostics",
        about=f"routing of {model}",
        findings=[summary, *findings(result)],
        settings=flat({name: value for name, value in settings.items() if name != "output"}),
        pictures=captioned(folder, result),
        metrics=layer_rows(result),
        seconds=float(result["seconds"]),
        versions=result["versions"],
        command=_command_of("routing", settings),
    )
