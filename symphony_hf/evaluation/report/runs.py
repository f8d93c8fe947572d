"""Data classes of a run on the page, whichever command wrote it. Fields without data are empty."""

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
    """A measured value of one model.

    Attributes:
        model: Name of the model within the run; empty if the run has one model.
        metric: `perplexity`, `loss`, `accuracy`, ...
        text: `clean`, `attacked`, or the name of a split.
        low: Lower end of the interval; None without an interval.
        number: Number of documents, windows or questions measured on.
        unit: `documents`, `windows` or `questions`.
    """

    model: str
    metric: str
    text: str
    value: float
    low: float | None = None
    high: float | None = None
    number: int | None = None
    unit: str = "documents"


@dataclass(frozen=True)
class AttackRow:
    """A model under one attack.

    Attributes:
        severity: Severity from 1 to 5; None for all together.
        change: Attacked / clean for perplexity, attacked - clean for accuracy.
        untouched: The change on the tokens that the attack leaves alone.
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
    """A comparison of two models on the same documents.

    Attributes:
        first: Model that the verdict is about.
        second: Model that it is compared with.
        text: `clean`, or an attack with its severity.
        what: The compared quantity, such as `ratio of perplexities`.
        verdict: `better`, `worse` or `not distinguishable`.
        headline: Whether the summary shows it.
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
    """Cost of training one model: seconds per step (with evaluations for a training run), and peak memory in bytes."""

    model: str = ""
    steps: int | None = None
    seconds_per_step: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """An output folder of a command.

    Attributes:
        folder: The folder.
        kind: Kind of run.
        about: Description of the run, in a phrase.
        findings: Results, one sentence each.
        settings: Settings by dotted name.
        curves: Losses by model, then `train` or `eval`: (step, loss in nats per token).
        graphs: Graphs by model, then by router: adjacency, (num_experts, num_experts).
        pictures: PNG files drawn by the command itself, by caption.
        metrics: Rows of the run's own table, by column.
        seconds: Duration of the command.
        parameters: Number of parameters of the model.
        versions: Package versions by name.
        command: Command line of the run.
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
    """Flatten nested settings to dotted names, without those that are None."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a distinct name for each run: its folder's name, with parent folders if needed.

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
    """Whether a value from a file is an interval."""
    return isinstance(value, Mapping) and {"estimate", "low", "high"} <= value.keys()


def as_interval(value: Mapping[str, Any]) -> Interval:
    """Read an interval from a file.

    Raises:
        KeyError: If an entry is missing.
        ValueError: If an entry is not a number.
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
