"""Tables of what merging, pruning and a smaller top-k cost, for the terminal and for a README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_hf.tables import Table

from .shrink import compare_results

_BY_GRAPH = ("graph", "centrality")


def compression_table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the results of merging and pruning as rows, header first."""
    rows = [
        ["model", "command", "experts", "parameters", "active", "perplexity [95%]", "after / before [95%]", "verdict"]
    ]
    for result in results:
        perplexity, experts = result["perplexity"], result["experts"]
        name = Path(result["settings"]["model"]).name
        if not rows[1:] or rows[-1][0] != name:
            rows.append([name, "", str(experts["before"]), *_parameters(result["parameters"]["before"])])
            rows[-1] += [_interval(perplexity["before"], 2), "", ""]
        rows.append([name, _how(result), str(experts["after"]), *_parameters(result["parameters"]["after"])])
        rows[-1] += [
            _interval(perplexity["after"], 2),
            _interval(perplexity["ratio"], 3),
            perplexity["ratio"]["verdict"],
        ]
    return rows


def sweep_table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the results of top-k sweeps as rows, header first."""
    rows = [["model", "top-k", "active parameters", "perplexity [95%]", "ratio to its own [95%]", "verdict"]]
    for result in results:
        for row in result["rows"]:
            own = row["top_k"] == result["experts"]["top_k"]
            cells = [Path(result["settings"]["model"]).name, str(row["top_k"]), _number(row["parameters"]["active"])]
            cells += [_interval(row["perplexity"], 2)]
            rows.append([*cells, *(("", "") if own else (_interval(row["ratio"], 3), row["ratio"]["verdict"]))])
    return rows


def findings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one sentence for each result with a graph criterion: its perplexity against a baseline's.

    Only results of the same model with the same number of experts are compared: otherwise the larger model would win.
    """
    sentences = []
    for result in results:
        command, by = _command(result), result["settings"]["by"]
        for other in results:
            alike = _command(other) == command and other["settings"]["model"] == result["settings"]["model"]
            alike = alike and other["experts"]["after"] == result["experts"]["after"]
            if by in _BY_GRAPH and alike and other["settings"]["by"] not in _BY_GRAPH:
                compared = compare_results(result, other)
                sentences.append(
                    f"{Path(result['settings']['model']).name}: {_how(result)}, against {other['settings']['by']}: "
                    f"perplexity {_percent(compared)}: {compared['verdict']}."
                )
    return sentences


def print_compression(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of merging or pruning."""
    console = console or Console()
    rows = [["", "experts", "parameters", "active", "perplexity [95%]"]]
    for when in ("before", "after"):
        numbers = str(result["experts"][when]), *_parameters(result["parameters"][when])
        rows.append([when, *numbers, _interval(result["perplexity"][when], 2)])
    _print(console, rows, f"{_how(result)}: {result['settings']['model']}", result)
    compared = result["perplexity"]["ratio"]
    console.print(f"- Perplexity after against before: {_percent(compared)}: {compared['verdict']}", highlight=False)
    lost = 1 - sum(result["load_kept"]) / len(result["load_kept"])
    if lost > 0:
        console.print(f"- {lost:.1%} of the calibration text's selections were of removed experts", highlight=False)


def print_sweep(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of a top-k sweep."""
    rows = [row[1:] for row in sweep_table([result])]
    _print(console or Console(), rows, f"fewer experts a token: {result['settings']['model']}", result)


def _print(console: Console, rows: list[list[str]], title: str, result: Mapping[str, Any]) -> None:
    Table(title, rows[0], rows[1:]).print(console)
    text = result["text"]
    console.print(f"- On {text['documents']} documents of {text['source']}, test split", highlight=False)
    if result["settings"]["output"] is not None:
        console.print(f"- A stock checkpoint: {result['settings']['output']}", highlight=False, soft_wrap=True)


def _command(result: Mapping[str, Any]) -> str:
    return str(result["command"].split()[1])


def _how(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    graph = f" ({settings['graph']})" if settings["by"] in _BY_GRAPH else ""
    return f"{_command(result)} by {settings['by']}{graph}"


def _parameters(counted: Mapping[str, int | None]) -> tuple[str, str]:
    return _number(counted["total"]), _number(counted["active"])


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.2f}M"


def _interval(interval: Mapping[str, Any], digits: int) -> str:
    estimate, low, high = (f"{interval[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def _percent(interval: Mapping[str, Any]) -> str:
    estimate, low, high = (f"{interval[name] - 1:+.1%}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
