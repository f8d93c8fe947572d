"""Tables of what merging, pruning and a smaller top-k cost."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.tables import Table


def print_compression(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of merging or pruning."""
    console = console or Console()
    rows = [["", "experts", "parameters", "active", "perplexity [95%]"]]
    for when in ("before", "after"):
        numbers = str(result["experts"][when]), *_parameters(result["parameters"][when])
        rows.append([when, *numbers, interval_text(result["perplexity"][when], 2)])
    _print(console, rows, f"{_how(result)}: {result['settings']['model']}", result)
    compared = result["perplexity"]["ratio"]
    console.print(f"- Perplexity after against before: {_percent(compared)}: {compared['verdict']}", highlight=False)
    lost = 1 - sum(result["load_kept"]) / len(result["load_kept"])
    if lost > 0:
        console.print(f"- {lost:.1%} of the calibration text's selections were of removed experts", highlight=False)


def print_sweep(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of a top-k sweep."""
    rows = [["top-k", "active parameters", "perplexity [95%]", "ratio to its own [95%]", "verdict"]]
    for row in result["rows"]:
        own = row["top_k"] == result["experts"]["top_k"]
        rows.append([str(row["top_k"]), _number(row["parameters"]["active"]), interval_text(row["perplexity"], 2)])
        rows[-1] += ["", ""] if own else [interval_text(row["ratio"], 3), row["ratio"]["verdict"]]
    _print(console or Console(), rows, f"fewer experts a token: {result['settings']['model']}", result)


def _print(console: Console, rows: list[list[str]], title: str, result: Mapping[str, Any]) -> None:
    Table(title, rows[0], rows[1:]).print(console)
    text = result["text"]
    console.print(f"- On {text['documents']} documents of {text['source']}, test split", highlight=False)
    if result["settings"]["output"] is not None:
        console.print(f"- A stock checkpoint: {result['settings']['output']}", highlight=False, soft_wrap=True)


def _how(result: Mapping[str, Any]) -> str:
    settings, command = result["settings"], result["command"].split()[1]
    graph = f" ({settings['graph']})" if settings["by"] in ("graph", "centrality") else ""
    return f"{command} by {settings['by']}{graph}"


def _parameters(counted: Mapping[str, int | None]) -> tuple[str, str]:
    return _number(counted["total"]), _number(counted["active"])


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.2f}M"


def _percent(interval: Mapping[str, Any]) -> str:
    estimate, low, high = (f"{interval[name] - 1:+.1%}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
