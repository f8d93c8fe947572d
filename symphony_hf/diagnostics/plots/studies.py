"""Figures of the theory benchmark and of ablation studies."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from symphony_hf.errors import EvaluationError

from .curves import LINES, MARKERS
from .figure import COLORS, plain_label, save_png


def plot_convergence(curves: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draw the distance to the planted graph by tokens, on logarithmic scales, next to tokens^-1/2."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        _draw_band(axes, curve["tokens"], curve["distance"], number, curve["name"])
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
    return _finish(figure, axes, path, "; dotted: closed form")


def plot_shares(shares: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Draw the share of correct experts that each routing selects, by noise."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(shares.items()):
        _draw_band(axes, [point["noise"] for point in points], points, number, name)
    axes.set(xlabel="noise of the logits (correct logits are higher by 1)", ylabel="share of correct experts selected")
    return _finish(figure, axes, path)


def _draw_band(axes: Any, xs: Sequence[float], points: Sequence[Mapping[str, Any]], number: int, label: str) -> None:
    style = {"color": COLORS[number % 6], "marker": MARKERS[number % 6], "linestyle": LINES[number % 4]}
    axes.plot(
        xs, [point["estimate"] for point in points], label=plain_label(label), markersize=4, linewidth=1.5, **style
    )
    if all(point["low"] is not None for point in points):
        low, high = ([point[end] for point in points] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=COLORS[number % 6], alpha=0.2, linewidth=0)


def _finish(figure: Figure, axes: Any, path: str | os.PathLike[str], note: str = "") -> Path:
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"bands: 95% t-intervals over seeds{note}", fontsize=9)
    return save_png(figure, path)


def plot_points(
    points: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    panels: Sequence[tuple[str, str, float, float]],
) -> Path:
    """Draw each variant's comparisons, with one row per variant and one panel per measure.

    Comparisons are given by variant, then by measure, with `estimate`, `low` and `high`; the latter two are None with
    one seed. `panels` are the measure, title, value without a difference, and scale of each.
    """
    if not points:
        raise EvaluationError(
            "no variants to plot: a study needs at least one point besides the system without a graph"
        )
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(points)), layout="constrained")
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for number, (axes, (measure, title, alike, scale)) in enumerate(zip(drawn, panels, strict=True)):
        _draw_bars(axes, [values[measure] for values in points.values()], scale, COLORS[number % len(COLORS)])
        axes.axvline(alike, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    drawn[0].set_yticks(range(len(points)), [plain_label(name, len(name)) for name in points], fontsize=8)
    drawn[0].invert_yaxis()
    figure.supxlabel("bars: 95% t-intervals over seeds; dashed: no difference", fontsize=9)
    return save_png(figure, path)


def _draw_bars(axes: Axes, intervals: list[Mapping[str, Any]], scale: float, color: str) -> None:
    for row, interval in enumerate(intervals):
        estimate = scale * interval["estimate"]
        if interval["low"] is not None:
            axes.plot([scale * interval["low"], scale * interval["high"]], [row, row], color=color, linewidth=1.5)
        axes.plot(estimate, row, marker="o", color=color, markersize=4)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
