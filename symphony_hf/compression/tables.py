"""What was measured, as rows, in the terminal and in a README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def compression_table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Results of merging and pruning as rows, header first."""
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
    """Results of sweeps of the top-k as rows, header first."""
    rows = [["model", "top-k", "active parameters", "perplexity [95%]", "ratio to its own [95%]", "verdict"]]
    for result in results:
        for row in result["rows"]:
            own = row["top_k"] == result["experts"]["top_k"]
            cells = [Path(result["settings"]["model"]).name, str(row["top_k"]), _number(row["parameters"]["active"])]
            cells += [_interval(row["perplexity"], 2)]
            rows.append([*cells, *(("", "") if own else (_interval(row["ratio"], 3), row["ratio"]["verdict"]))])
    return rows


def print_compression(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what merging or pruning did."""
    console = console or Console()
    _print(console, compression_table([result]), result)
    lost = 1 - sum(result["load_kept"]) / len(result["load_kept"])
    if lost > 0:
        console.print(f"- {lost:.1%} of the calibration text's choices were of experts that are gone", highlight=False)


def print_sweep(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a sweep of the top-k."""
    _print(console or Console(), sweep_table([result]), result)


def _print(console: Console, rows: list[list[str]], result: Mapping[str, Any]) -> None:
    header, *rest = rows
    table = Table(title=f"{result['text']['documents']} documents of {result['text']['source']}", title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rest:
        table.add_row(*row)
    console.print(table)
    if result["settings"]["output"] is not None:
        console.print(f"- A stock checkpoint: {result['settings']['output']}", highlight=False, soft_wrap=True)


def _how(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    graph = f", {settings['graph']} graph" if settings["by"] in ("graph", "centrality") else ""
    return f"{result['command'].split()[1]} by {settings['by']}{graph}"


def _parameters(counted: Mapping[str, int | None]) -> tuple[str, str]:
    return _number(counted["total"]), _number(counted["active"])


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.2f}M"


def _interval(interval: Mapping[str, Any], digits: int) -> str:
    estimate, low, high = (f"{interval[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
