"""Terminal tables and verdicts of a robustness evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from symphony_hf.diagnostics.labels import model_names
from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.tables import Table, TableCell

from .settings import KINDS

_LOSSES = {
    "better": "it loses less than",
    "worse": "it loses more than",
    "not distinguishable": "its loss is not distinguishable from that of",
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
        console.print(Text(line), soft_wrap=True)
    names = model_names(settings, list(result["models"]))
    for role, model in result["models"].items():
        _levels_table(names[role], model, result["measure"]).print(console)
    if "comparisons" in result:
        _comparison_table(result).print(console)
        for line in verdicts(result):
            console.print(Text(line), soft_wrap=True)


def _narrow(result: Mapping[str, Any]) -> list[str]:
    """Return a warning if an interval of shares has no width. Source: the rule of three."""
    measure, number = result["measure"], result["documents"]["number"]
    rows = [row for model in result["models"].values() for row in (model["clean"], *model["attacks"])]
    intervals = [row[name] for row in rows for name in (measure["level"], measure["change"]) if name in row]
    if measure["change"] != "difference" or all(one["low"] < one["high"] for one in intervals):
        return []
    return [
        f"An interval has no width where all {number} questions agree. A case that affects fewer than "
        f"{3 / number:.1%} of questions may be missing from so few."
    ]


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for clean inputs, and one for each attack over all its severities."""
    comparisons, measure = result["comparisons"], result["measure"]
    a, b = model_names(result["settings"], ("model", "against")).values()
    what, quantity = KINDS[result["task"]].name, _quantity(comparisons, measure)
    lines = [f"On clean {what}, {a} is {_describe(comparisons['clean'], b, quantity)}."]
    for row in _overall(comparisons["attacks"]):
        loses = _LOSSES[row[measure["change"]]["verdict"]]
        compared = _describe(row[measure["level"]], b, quantity)
        lines.append(f"Under {row['attack']}, {a} is {compared}. Against clean {what} {loses} {b}.")
    unit = comparisons.get("unit", "token")
    if unit != "token":
        lines.append(
            f"The models' tokens differ, so their perplexities per token do not compare: they are compared per {unit}."
        )
    lines.append(
        "For equal models, one verdict in twenty would be better or worse by chance; there are "
        f"{_num_verdicts(comparisons)}."
    )
    return lines


def _quantity(comparisons: Mapping[str, Any], measure: Mapping[str, Any]) -> str:
    """Return what two models are compared by, such as `ratio of perplexities per token`."""
    per = f" per {comparisons['unit']}" if "unit" in comparisons else ""
    return f"{measure['change']} of {_PLURALS[measure['level']]}{per}"


def _num_verdicts(entry: Any) -> int:
    """Count the intervals with a verdict in a part of a result."""
    if isinstance(entry, list):
        return sum(map(_num_verdicts, entry))
    if not isinstance(entry, Mapping):
        return 0
    return 1 if "verdict" in entry else sum(map(_num_verdicts, entry.values()))


def _overall(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return each attack's row of all severities together, or its only row."""
    return list({row["attack"]: row for row in rows}.values())


def _describe(interval: Mapping[str, Any], other: str, quantity: str) -> str:
    value = f"({quantity} {interval_text(interval, 4)})"
    if interval["verdict"] == "not distinguishable":
        return f"not distinguishable from {other} {value}"
    return f"{interval['verdict']} than {other} {value}"


def _levels_table(name: str, model: Mapping[str, Any], measure: Mapping[str, Any]) -> Table:
    level, change = measure["level"], _CHANGES[measure["change"]]
    is_text = level == "perplexity"
    further = ("per word", "per byte") if is_text else ()
    untouched = ("on untouched tokens",) if is_text else ()
    also = [heading for other in measure["also"] for heading in (other, f"{other}, {change}")]
    header = ["attack", "severity", level, *further, change, *untouched, *also]
    rows = ({"attack": "clean"} | dict(model["clean"]), *model["attacks"])
    return Table(name, header, [_level_cells(row, measure) for row in rows])


def _level_cells(row: Mapping[str, Any], measure: Mapping[str, Any]) -> list[TableCell]:
    """Return the cells of a row. Those of the change are empty in the clean row."""
    change = measure["change"]
    cells = [TableCell(row["attack"]), _severity(row), _interval(row[measure["level"]], _DIGITS[measure["level"]])]
    if measure["level"] == "perplexity":
        untouched = row.get("untouched")
        cells += [
            TableCell("" if row[name] is None else f"{row[name]:{form}}", row[name])
            for name, form in (("per_word", ".4g"), ("per_byte", ".3f"))
        ]
        cells += [_interval(row.get(change), 3), _interval(untouched and untouched["ratio"], 3)]
    else:
        cells.append(_interval(row.get(change), 3))
    for other in measure["also"]:
        values = row["also"][other]
        cells += [_interval(values["level"], 3), _interval(values.get(change), 3)]
    return cells


def _comparison_table(result: Mapping[str, Any]) -> Table:
    comparisons, measure = result["comparisons"], result["measure"]
    level, change, also = measure["level"], measure["change"], measure["also"]
    unit = f", per {comparisons['unit']}" if "unit" in comparisons else ""
    header = ["attack", "severity"]
    for name in (level, *also):
        header += [f"{change} of {_PLURALS.get(name, name)}", "verdict", f"difference of {_CHANGES[change]}", "verdict"]
    clean = [
        pair for one in (comparisons["clean"], *(comparisons["also"][name] for name in also)) for pair in (one, None)
    ]
    rows = [[TableCell("clean"), TableCell(""), *_with_verdicts(clean)]]
    for row in comparisons["attacks"]:
        pairs = [row[level], row[change]]
        for name in also:
            pairs += [row["also"][name]["level"], row["also"][name][change]]
        rows.append([TableCell(row["attack"]), _severity(row), *_with_verdicts(pairs)])
    return Table(f"the first against the second{unit}", header, rows)


def _with_verdicts(intervals: Sequence[Mapping[str, Any] | None]) -> list[TableCell]:
    return [
        cell
        for interval in intervals
        for cell in (_interval(interval, 4), TableCell("" if interval is None else interval["verdict"]))
    ]


def _severity(row: Mapping[str, Any]) -> TableCell:
    if "severity" not in row:
        return TableCell("")
    return TableCell("all") if row["severity"] is None else TableCell(str(row["severity"]), row["severity"])


def _interval(interval: Mapping[str, Any] | None, digits: int) -> TableCell:
    return TableCell("") if interval is None else TableCell(interval_text(interval, digits), interval["estimate"])
