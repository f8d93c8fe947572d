"""Terminal tables, verdicts and summaries of a robustness evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from symphony_hf.evaluation.clean_attacked import Measured, Scores
from symphony_hf.evaluation.settings import AttackCase

from .settings import KINDS
from .task import MetricReport

_LOSSES = {
    "better": "loses less than",
    "worse": "loses more than",
    "not distinguishable": "loses what cannot be told from",
}
_CHANGES = {"ratio": "attacked / clean", "difference": "attacked - clean"}
_PLURALS = {"perplexity": "perplexities", "accuracy": "accuracies"}
_DIGITS = {"perplexity": 2, "accuracy": 3}


def print_robustness(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print levels, comparisons and verdicts of `evaluate_robustness`."""
    console = console or Console()
    settings, documents = result["settings"], result["documents"]
    words = f", {documents['words']:,} words" if "words" in documents else ""
    answered = f", answered {documents['answers']}" if "answers" in documents else ""
    lines = [
        f"{documents['number']} {documents['unit']}{words}: {documents['source']}{answered}; attack seeds "
        f"{', '.join(map(str, settings['seeds']))}; 95% intervals over {documents['unit']}",
        *result["notes"],
        *_narrow(result),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for role, model in result["models"].items():
        console.print(_levels_table(settings[role], model, result["measure"]))
    if "comparisons" in result:
        console.print(_comparison_table(result))
        for line in verdicts(result):
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _narrow(result: Mapping[str, Any]) -> list[str]:
    """A warning, where there are intervals of shares without a width. Source: the rule of three."""
    measure, number = result["measure"], result["documents"]["number"]
    rows = [row for model in result["models"].values() for row in (model["clean"], *model["attacks"])]
    intervals = [row[name] for row in rows for name in (measure["level"], measure["change"]) if name in row]
    if measure["change"] != "difference" or all(one["low"] < one["high"] for one in intervals):
        return []
    return [
        f"An interval without a width means that none of the {number} questions differs; what happens to fewer than "
        f"{3 / number:.1%} of all questions may well not be among them"
    ]


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """A sentence for clean input, and one for each attack over all its severities."""
    comparisons, measure = result["comparisons"], result["measure"]
    a, b = result["settings"]["model"], result["settings"]["against"]
    what = KINDS[result["task"]].name
    lines = [f"On clean {what}, {a} is {_told(comparisons['clean'], b, measure)}."]
    for row in _overall(comparisons["attacks"]):
        loses = _LOSSES[row[measure["change"]]["verdict"]]
        told = _told(row[measure["level"]], b, measure)
        lines.append(f"Under {row['attack']}, {a} is {told}. Against clean {what} it {loses} {b}.")
    number = (1 + 2 * len(comparisons["attacks"])) * (1 + len(measure["also"]))
    lines.append(f"Of models that are equal, one verdict in twenty would say otherwise by chance; there are {number}.")
    return lines


def _overall(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The row of each attack that takes all severities together; its only one where there is one severity."""
    return list({row["attack"]: row for row in rows}.values())


def _told(interval: Mapping[str, Any], other: str, measure: Mapping[str, Any]) -> str:
    value = f"({measure['change']} {_interval(interval, 4)})"
    if interval["verdict"] == "not distinguishable":
        return f"not distinguishable from {other} {value}"
    return f"{interval['verdict']} than {other} {value}"


def _levels_table(name: str, model: Mapping[str, Any], measure: Mapping[str, Any]) -> Table:
    table = Table(title=name, title_justify="left")
    table.add_column("attack")
    level, change = measure["level"], _CHANGES[measure["change"]]
    further = ("per word", "per byte") if level == "perplexity" else ()
    also = [heading for other in measure["also"] for heading in (other, f"{other}, {change}")]
    untouched = ("on untouched tokens",) if level == "perplexity" else ()
    for column in ("severity", level, *further, change, *untouched, *also):
        table.add_column(column, justify="right")
    for row in ({"attack": "clean"} | dict(model["clean"]), *model["attacks"]):
        table.add_row(*_level_cells(row, measure))
    return table


def _level_cells(row: Mapping[str, Any], measure: Mapping[str, Any]) -> list[str]:
    """Of the clean row, those of the change are empty."""
    digits = _DIGITS[measure["level"]]
    cells = [row["attack"], _severity(row), _interval(row[measure["level"]], digits)]
    if measure["level"] == "perplexity":
        cells += [f"{row['per_word']:.4g}", f"{row['per_byte']:.3f}"]
    cells.append(_interval(row.get(measure["change"]), 3))
    if measure["level"] == "perplexity":
        untouched = row.get("untouched")
        cells.append(_interval(untouched and untouched["ratio"], 3))
    for other in measure["also"]:
        values = row["also"][other]
        cells += [_interval(values["level"], 3), _interval(values.get(measure["change"]), 3)]
    return cells


def _comparison_table(result: Mapping[str, Any]) -> Table:
    comparisons, measure = result["comparisons"], result["measure"]
    unit = f", per {comparisons['unit']}" if "unit" in comparisons else ""
    table = Table(title=f"the first against the second{unit}", title_justify="left")
    table.add_column("attack")
    table.add_column("severity", justify="right")
    levels = [measure["level"], *measure["also"]]
    for level in levels:
        for column in (
            f"{measure['change']} of {_PLURALS.get(level, level)}",
            f"difference of {_CHANGES[measure['change']]}",
        ):
            table.add_column(column)
            table.add_column("verdict")
    clean = [comparisons["clean"], *(comparisons["also"][other] for other in measure["also"])]
    cells = [text for one in clean for text in (_interval(one, 4), one["verdict"], "", "")]
    table.add_row("clean", "", *cells)
    for row in comparisons["attacks"]:
        pairs = [(row[measure["level"]], row[measure["change"]])]
        pairs += [(row["also"][other]["level"], row["also"][other][measure["change"]]) for other in measure["also"]]
        cells = [text for pair in pairs for one in pair for text in (_interval(one, 4), one["verdict"])]
        table.add_row(row["attack"], _severity(row), *cells)
    return table


def _severity(row: Mapping[str, Any]) -> str:
    if "severity" not in row:
        return ""
    return "all" if row["severity"] is None else str(row["severity"])


def _interval(interval: Mapping[str, Any] | None, digits: int = 2) -> str:
    if interval is None:
        return ""
    estimate, low, high = (f"{interval[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


class Group(NamedTuple):
    """Cells that are reported as one row: the seeds of one severity, or of all of them.

    Attributes:
        attack: Its name.
        severity: From 1 to 5; None for all that were measured.
        cases: The attacked forms.
    """

    attack: str
    severity: int | None
    cases: list[AttackCase]


def groups_of(cases: Sequence[AttackCase]) -> list[Group]:
    """The rows of a report: each severity of each attack, and all severities together where there are several."""
    groups = []
    for attack in dict.fromkeys(case.attack for case in cases):
        own = [case for case in cases if case.attack == attack]
        severities = list(dict.fromkeys(case.severity for case in own))
        groups += [Group(attack, severity, [c for c in own if c.severity == severity]) for severity in severities]
        if len(severities) > 1:
            groups.append(Group(attack, None, own))
    return groups


def summarize(measured: Mapping[str, Measured[Scores]], report: MetricReport[Scores]) -> dict[str, Any]:
    """Levels, and comparisons where there are two models.

    Args:
        measured: By role: `model`, and `against` where there is one.
        report: Metric report that turns scores into intervals.

    Returns:
        `measure`: how to read the rest, see `MetricReport`. `models` by role: `clean`, and `attacks`, a row for
        each group. For two models also `comparisons`, see `compare_models`.
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
    """One model against another on the same examples.

    Args:
        a: The model that verdicts are about.
        b: The other one.
        report: Metric report that turns scores into intervals.

    Returns:
        `clean`: one level against the other. `attacks`: for each row the same of attacked examples, and of the
        changes. Each has a verdict. More as the report has it.
    """
    groups = groups_of(list(a.attacked))
    rows = [_labels(group) | report.compare_attacked(a, b, group.cases) for group in _progress(groups, "both")]
    return {**report.comparison(a, b), "clean": report.as_entry(report.compare_clean(a, b)), "attacks": rows}


def _labels(group: Group) -> dict[str, Any]:
    return {"attack": group.attack, "severity": group.severity}


def _progress(groups: list[Group], what: str) -> Iterator[Group]:
    return iter(tqdm(groups, desc=f"Intervals of {what}", unit=" rows", delay=2, disable=None))
