"""Where routing changes: under attack, by layer and by token; and over checkpoints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ...errors import EvaluationError
from .figure import save_png, shown_names

_MOST_WRITTEN = 16
"""Layers up to which each cell has its number in it."""


def plot_flips(
    panels: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[float | None]]]],
    title: str,
    path: str | os.PathLike[str],
) -> Path:
    """Draw a plan of where routing flips: layers by severity, by the distance from the attack, by kind of token.

    Args:
        panels: By what the columns are ("severity"): their names, and, by layer name, the share of choices that changed
            in each; None where there is no token. All have the same layers.
        title: Of the figure.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        EvaluationError: If there is no panel, or none with a number.
    """
    values = [v for _, rows in panels.values() for row in rows.values() for v in row if v is not None]
    if not values:
        raise EvaluationError("no changes to draw: nothing was attacked")
    layers = list(next(iter(panels.values()))[1])
    titles, left_out = shown_names(layers, most=48)
    widths = [max(len(names), 2) for names, _ in panels.values()]
    figure = Figure(figsize=(0.52 * sum(widths) + 2.6, 0.27 * max(len(titles), 5) + 1.7), layout="constrained")
    figure.suptitle(f"{title}{left_out}", fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    top = max(values) or 1.0
    for place, (what, (names, rows)) in enumerate(panels.items()):
        cells = np.array([rows[name] for name in titles.values()], dtype=float)
        image = _draw_plan(axes[place], cells, names, top)
        axes[place].set_xlabel(what, fontsize=9)
        axes[place].set_yticks(range(len(titles)), list(titles) if place == 0 else [""] * len(titles), fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, format=lambda value, _: f"{100 * value:g}%")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of choices that changed", fontsize=9)
    return save_png(figure, path)


def _draw_plan(axes: Axes, cells: np.ndarray, names: Sequence[str], top: float) -> AxesImage:
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="0.9")
    image = axes.imshow(cells, cmap=colors, vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, pad=2)
    if len(cells) <= _MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                color = "white" if value > 0.6 * top else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
    return image


def plot_saturation(
    saturation: Mapping[str, Sequence[float]],
    moments: Sequence[str],
    path: str | os.PathLike[str],
    chance: float | None = None,
) -> Path:
    """Draw how much of its final routing each checkpoint has, one curve a layer.

    Args:
        saturation: By layer name, see `diagnostics.router_saturation`. Shape of each: (checkpoints,).
        moments: What each checkpoint is called.
        path: Of the PNG.
        chance: K / E, what choosing at random would have; not drawn when None.

    Returns:
        The path.

    Raises:
        EvaluationError: If there are fewer than two checkpoints, or a layer has others.
    """
    if len(moments) < 2 or not saturation or any(len(row) != len(moments) for row in saturation.values()):
        raise EvaluationError("a curve of saturation needs two checkpoints or more, and each layer's value at all")
    titles, left_out = shown_names(list(saturation))
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(titles)))
    for number, (title, name) in enumerate(titles.items()):
        style = {"color": shades[number], "marker": "os^Dv"[number % 5], "markersize": 4, "linewidth": 1.4}
        axes.plot(range(len(moments)), saturation[name], label=title, **style)
    if chance is not None:
        axes.axhline(chance, color="0.4", linewidth=0.8, linestyle="--")
        axes.text(len(moments) - 1, chance + 0.01, "by chance", fontsize=8, color="0.3", ha="right", va="bottom")
    longest = max(map(len, moments))
    turned: dict[str, Any] = (
        {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if longest * len(moments) > 60 else {}
    )
    axes.set_xticks(range(len(moments)), moments, fontsize=8, **turned)
    axes.set(ylim=(0, 1.03), ylabel="choices that are the last one's")
    axes.set_title(f"Router saturation{left_out}", fontsize=11)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save_png(figure, path)
