"""The planted benchmark: how near a learned graph comes to the truth, and what routing by it gains."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .figure import COLORS, save_png
from .runs import LINES, MARKERS


def plot_convergence(curves: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draw the distance to the planted graph by tokens, both on logarithmic scales, beside tokens^-1/2.

    Args:
        curves: `name`, `tokens`, `distance`, one interval each, and where it is known `expected`.
        path: Of the PNG.
    """
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        _draw(axes, curve["tokens"], curve["distance"], number, curve["name"])
        if "expected" in curve:
            axes.plot(curve["tokens"], curve["expected"], color=COLORS[number % 6], linewidth=0.8, linestyle=":")
    first = curves[0]
    start = first["tokens"][0], first["distance"][0]["estimate"]
    axes.plot(
        first["tokens"],
        [start[1] * (tokens / start[0]) ** -0.5 for tokens in first["tokens"]],
        color="black",
        linewidth=0.8,
        linestyle="--",
        label="tokens$^{-1/2}$",
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="distance to the planted graph")
    return _finish(figure, axes, path)


def plot_shares(shares: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Draw the share of right experts that each routing chooses, by noise.

    Args:
        shares: By routing: intervals, with their `noise`.
        path: Of the PNG.
    """
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(shares.items()):
        _draw(axes, [point["noise"] for point in points], points, number, name)
    axes.set(xlabel="noise of the logits (the right ones stand out by 1)", ylabel="share of right experts chosen")
    return _finish(figure, axes, path)


def _draw(axes: Any, xs: Sequence[float], points: Sequence[Mapping[str, Any]], number: int, label: str) -> None:
    style = {"color": COLORS[number % 6], "marker": MARKERS[number % 6], "linestyle": LINES[number % 4]}
    axes.plot(xs, [point["estimate"] for point in points], label=label, markersize=4, linewidth=1.5, **style)
    if all(point["low"] is not None for point in points):
        low, high = ([point[end] for point in points] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=COLORS[number % 6], alpha=0.2, linewidth=0)


def _finish(figure: Figure, axes: Any, path: str | os.PathLike[str]) -> Path:
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("bands: 95% t-intervals over seeds; dotted: closed form", fontsize=9)
    return save_png(figure, path)
