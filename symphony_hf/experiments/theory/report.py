"""What the benchmark found, in sentences and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def share_table(result: Mapping[str, Any]) -> list[list[str]]:
    """The share of right experts by noise and routing, header first."""
    names = list(result["shares"])
    table = [["noise", *names, "symphony less smoe", "distance of its graph"]]
    for place, gain in enumerate(result["gains"]):
        cells = [f"{100 * result['shares'][name][place]['estimate']:.2f}%" for name in names]
        difference = f"{100 * gain['estimate']:+.2f}{_ends(gain, 100)}"
        table.append([f"{gain['noise']:g}", *cells, difference, _level(result["distance_under_noise"][place], 3)])
    return table


def convergence_table(result: Mapping[str, Any]) -> list[list[str]]:
    """The distance to the planted graph by tokens and decay, header first."""
    curves = result["convergence"]
    header = ["tokens"]
    for curve in curves:
        header += [curve["name"], *(["in closed form"] if "expected" in curve else [])]
    table = [header]
    for place, tokens in enumerate(curves[0]["tokens"]):
        cells = [f"{tokens:,}"]
        for curve in curves:
            cells.append(_level(curve["distance"][place], 4))
            cells += [f"{curve['expected'][place]:.4f}"] if "expected" in curve else []
        table.append(cells)
    return table


def theory_findings(result: Mapping[str, Any]) -> list[str]:
    """What follows, in sentences."""
    suited, fixed, noisy = result["convergence"]
    before, last = (f"{tokens:,} tokens" for tokens in suited["tokens"][-2:])
    sentences = [
        "Without noise, with a decay suited to the number of updates, the distance to the planted graph falls as "
        f"tokens to the power {_level(suited['slope'], 2)}; the closed form of its mean square gives "
        f"{suited['expected_slope']:.2f}: -0.5 up to a logarithm.",
        f"With a decay that stays, it is {_level(fixed['distance'][-1], 4)} at {last}, where it was "
        f"{_level(fixed['distance'][-2], 4)} at {before}: the floor that its closed form has, not convergence.",
        f"Under noise, it is {_level(noisy['distance'][-1], 4)} at {last}, from {_level(noisy['distance'][-2], 4)} at "
        f"{before}: what is learned is the co-selection of the choices that were made, not of those that were right.",
    ]
    better = [f"{g['noise']:g}" for g in result["gains"] if g["low"] is not None and g["low"] > 0]
    worse = [f"{g['noise']:g}" for g in result["gains"] if g["high"] is not None and g["high"] < 0]
    sentences.append(
        f"Symphony chooses more of the right experts than SMoE at noise {', '.join(better) or '(none)'}, and fewer at "
        f"noise {', '.join(worse) or '(none)'}."
    )
    return sentences


def _level(values: Mapping[str, Any], digits: int) -> str:
    return f"{values['estimate']:.{digits}f}{_ends(values, 1, digits)}"


def _ends(values: Mapping[str, Any], scale: float, digits: int = 2) -> str:
    if values["low"] is None:
        return ""
    return f" [{scale * values['low']:.{digits}f}, {scale * values['high']:.{digits}f}]"


def print_theory(result: Mapping[str, Any], console: Console | None = None) -> None:
    """The tables, the findings, and where the files are."""
    console = console or Console()
    for header, *rows in (convergence_table(result), share_table(result)):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in theory_findings(result):
        console.print(sentence, highlight=False)
    console.print(f"Written to {Path(result['output']).resolve()}", highlight=False, soft_wrap=True)
