"""An evaluation in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_LOSSES = {
    "better": "loses less than",
    "worse": "loses more than",
    "not distinguishable": "loses what cannot be told from",
}


def print_robustness(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print levels, comparisons and verdicts of `evaluate_robustness`."""
    console = console or Console()
    settings, documents = result["settings"], result["documents"]
    console.print(
        f"{documents['number']} documents, {documents['words']:,} words: {documents['source']}; "
        f"attack seeds {', '.join(map(str, settings['seeds']))}; 95% intervals over documents",
        highlight=False,
        soft_wrap=True,
    )
    for role, model in result["models"].items():
        console.print(_levels_table(settings[role], model))
    if "comparisons" in result:
        console.print(_comparison_table(result["comparisons"]))
        for line in verdicts(result):
            console.print(line, highlight=False, soft_wrap=True)


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """A sentence for clean text, and one for each attack over all its severities."""
    comparisons = result["comparisons"]
    a, b = result["settings"]["model"], result["settings"]["against"]
    lines = [f"On clean text, {a} is {_told(comparisons['clean'], b)}."]
    for row in _overall(comparisons["attacks"]):
        loses = _LOSSES[row["ratio"]["verdict"]]
        lines.append(f"Under {row['attack']}, {a} is {_told(row['perplexity'], b)}. Against clean text it {loses} {b}.")
    number = 1 + 2 * len(comparisons["attacks"])
    lines.append(f"Of models that are equal, one verdict in twenty would say otherwise by chance; there are {number}.")
    return lines


def _overall(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The row of each attack that takes all severities together; its only one where there is one severity."""
    return list({row["attack"]: row for row in rows}.values())


def _told(interval: Mapping[str, Any], other: str) -> str:
    value = f"(ratio {_interval(interval, 4)})"
    if interval["verdict"] == "not distinguishable":
        return f"not distinguishable from {other} {value}"
    return f"{interval['verdict']} than {other} {value}"


def _levels_table(name: str, model: Mapping[str, Any]) -> Table:
    table = Table(title=name, title_justify="left")
    for column, justify in (("attack", "left"), ("severity", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("perplexity", "per word", "per byte", "attacked / clean", "on untouched tokens"):
        table.add_column(column, justify="right")
    clean = model["clean"]
    table.add_row("clean", "", _interval(clean["perplexity"]), *_rates(clean), "", "")
    for row in model["attacks"]:
        untouched = "" if row["untouched"] is None else _interval(row["untouched"]["ratio"], 3)
        ratio = _interval(row["ratio"], 3)
        table.add_row(row["attack"], _severity(row), _interval(row["perplexity"]), *_rates(row), ratio, untouched)
    return table


def _comparison_table(comparisons: Mapping[str, Any]) -> Table:
    title = f"the first against the second, per {comparisons['unit']}"
    table = Table(title=title, title_justify="left")
    table.add_column("attack")
    table.add_column("severity", justify="right")
    for column in ("ratio of perplexities", "difference of attacked / clean"):
        table.add_column(column)
        table.add_column("verdict")
    clean = comparisons["clean"]
    table.add_row("clean", "", _interval(clean, 4), clean["verdict"], "", "")
    for row in comparisons["attacks"]:
        levels, ratios = row["perplexity"], row["ratio"]
        table.add_row(
            row["attack"],
            _severity(row),
            _interval(levels, 4),
            levels["verdict"],
            _interval(ratios, 4),
            ratios["verdict"],
        )
    return table


def _severity(row: Mapping[str, Any]) -> str:
    return "all" if row["severity"] is None else str(row["severity"])


def _rates(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['per_word']:.4g}", f"{row['per_byte']:.3f}"


def _interval(interval: Mapping[str, Any], digits: int = 2) -> str:
    estimate, low, high = (f"{interval[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
