"""Data classes for a run on the page, whichever command made it. A field without data is empty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from symphony_hf.errors import ReportError
from symphony_hf.evaluation.statistics import Interval

Kind = Literal["training run", "quickstart", "evaluation", "routing diagnostics"]


@dataclass(frozen=True)
class Level:
    """A number that was measured of one model.

    Attributes:
        model: Which of the run's; empty where it has one.
        metric: `perplexity`, `loss`, `accuracy`, ...
        text: `clean`, `attacked`, or the name of a split.
        low: Lower end of the interval; None without an interval.
        documents: Number of documents or questions measured on.
    """

    model: str
    metric: str
    text: str
    value: float
    low: float | None = None
    high: float | None = None
    documents: int | None = None


@dataclass(frozen=True)
class AttackRow:
    """A model under one attack.

    Attributes:
        severity: From 1 to 5; None for all that were measured together.
        change: Attacked / clean of a perplexity, attacked - clean of an accuracy.
        untouched: The same on the tokens that the attack left alone.
    """

    model: str
    attack: str
    severity: int | None
    metric: str
    value: Interval
    change: Interval | None = None
    untouched: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """One model against another, on the same documents.

    Attributes:
        first: The model that the verdict is about.
        second: The other one.
        text: `clean`, or an attack with its severity.
        what: The number that is compared, such as `ratio of perplexities`.
        verdict: `better`, `worse` or `not distinguishable`.
        headline: Whether it belongs to the summary.
    """

    first: str
    second: str
    text: str
    what: str
    value: Interval
    verdict: str
    headline: bool = False


@dataclass(frozen=True)
class Cost:
    """Cost of training one model.

    Attributes:
        seconds_per_step: Without evaluations for the quickstart, with them for a training run.
        memory: Peaks in bytes, by what was measured.
    """

    model: str = ""
    steps: int | None = None
    seconds_per_step: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A folder that one of our commands wrote.

    Attributes:
        folder: Where it is.
        kind: Which command made it.
        about: Description of the run, in a phrase.
        findings: Results, one sentence each.
        settings: Settings by dotted name.
        curves: Losses by model, then `train` or `eval`: (step, loss in nats a token).
        graphs: Graphs by model, then by router: adjacency, (num_experts, num_experts).
        pictures: PNG files drawn by the command itself, by caption.
        metrics: Rows of its own table, by column.
        seconds: The command took in all.
        parameters: Number of parameters of the model.
        versions: Package versions by name.
        command: That made it.
    """

    folder: Path
    kind: Kind
    about: str
    findings: Sequence[str]
    settings: Mapping[str, Any]
    levels: Sequence[Level] = ()
    attacks: Sequence[AttackRow] = ()
    comparisons: Sequence[Comparison] = ()
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] = field(default_factory=dict)
    graphs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    costs: Sequence[Cost] = ()
    seconds: float | None = None
    parameters: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, those that are None left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, with as many of the folders above as it takes to tell them apart.

    Raises:
        ReportError: If a folder is given twice.
    """
    paths = [run.folder.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ReportError(f"report: `{path}` is given twice: give each run once")
    names = [path.name or str(path) for path in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def is_interval(value: Any) -> bool:
    """Whether a value of a file is an interval."""
    return isinstance(value, Mapping) and {"estimate", "low", "high"} <= value.keys()


def as_interval(value: Mapping[str, Any]) -> Interval:
    """An interval from a file.

    Raises:
        KeyError: If a part of it is missing.
        ValueError: If an end is no number.
    """
    null, p_value = value.get("null"), value.get("p_value")
    return Interval(
        float(value["estimate"]),
        float(value["low"]),
        float(value["high"]),
        float(value["confidence"]),
        int(value["num_documents"]),
        int(value["seed"]),
        None if null is None else float(null),
        None if p_value is None else float(p_value),
    )
