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
    first = next(iter(curves.values()))
    table = [["tokens", *curves]]
    for place, tokens in enumerate(first["tokens"]):
        table.append([f"{tokens:,}", *(_level(curve["distance"][place], 4) for curve in curves.values())])
    return table


def theory_findings(result: Mapping[str, Any]) -> list[str]:
    """What follows, in sentences."""
    sentences = []
    for name, curve in result["convergence"].items():
        slope = curve["slope"]
        inside = slope["low"] is not None and slope["low"] <= -0.5 <= slope["high"]
        word = "-1/2 is inside" if inside else "-1/2 is outside"
        sentences.append(
            f"Without noise, with {name}, the distance to the planted graph falls as tokens to the power "
            f"{_level(slope, 2)}: {word}."
        )
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
