"""The findings of the theory benchmark, as sentences and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.tables import Table


def share_table(result: Mapping[str, Any]) -> Table:
    """Return the share of correct experts by noise and routing."""
    names = list(result["shares"])
    rows = []
    for index, gain in enumerate(result["gains"]):
        shares = [f"{100 * result['shares'][name][index]['estimate']:.2f}%" for name in names]
        distance = interval_text(result["distance_under_noise"][index], 3)
        rows.append([f"{gain['noise']:g}", *shares, interval_text(gain, 2, 100, "+"), distance])
    return Table("", ["noise", *names, "symphony less smoe", "distance of its graph"], rows)


def convergence_table(result: Mapping[str, Any]) -> Table:
    """Return the distance to the planted graph by tokens and decay."""
    curves = result["convergence"]
    header = ["tokens"]
    for curve in curves:
        header += [curve["name"], *(["in closed form"] if "expected" in curve else [])]
    rows = []
    for index, tokens in enumerate(curves[0]["tokens"]):
        cells = [f"{tokens:,}"]
        for curve in curves:
            cells.append(interval_text(curve["distance"][index], 4))
            cells += [f"{curve['expected'][index]:.4f}"] if "expected" in curve else []
        rows.append(cells)
    return Table("", header, rows)


def theory_findings(result: Mapping[str, Any]) -> list[str]:
    """Return the findings as sentences."""
    suited, fixed, noisy = result["convergence"]
    before, last = (f"{tokens:,} tokens" for tokens in suited["tokens"][-2:])
    sentences = [
        "Without noise and with a decay suited to the number of updates, the distance to the planted graph falls as "
        f"a power of the number of tokens, {interval_text(suited['slope'], 2)}; the closed form gives "
        f"{suited['expected_slope']:.2f}, which is -0.5 up to a logarithm.",
        f"With a fixed decay, it is {interval_text(fixed['distance'][-1], 4)} at {last} and "
        f"{interval_text(fixed['distance'][-2], 4)} at {before}: it stays at the floor of its closed form and does not "
        "converge.",
        f"Under noise, it is {interval_text(noisy['distance'][-1], 4)} at {last} and "
        f"{interval_text(noisy['distance'][-2], 4)} at {before}: the graph learns the co-selections of the choices "
        "made, not of the correct ones.",
    ]
    better = [f"{g['noise']:g}" for g in result["gains"] if g["low"] is not None and g["low"] > 0]
    worse = [f"{g['noise']:g}" for g in result["gains"] if g["high"] is not None and g["high"] < 0]
    sentences.append(
        f"Symphony chooses more correct experts than SMoE at noise {', '.join(better) or '(none)'}, and fewer at "
        f"noise {', '.join(worse) or '(none)'}."
    )
    return sentences


def print_theory(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables, the findings and the path of the files."""
    console = console or Console()
    for table in (convergence_table(result), share_table(result)):
        table.print(console)
    for sentence in theory_findings(result):
        console.print(sentence, highlight=False)
    console.print(f"Written to {Path(result['output']).resolve()}", highlight=False, soft_wrap=True)
