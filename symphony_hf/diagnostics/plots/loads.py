"""Loads of experts over time and by domain, relative to the even load."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from symphony_hf.errors import EvaluationError

from .figure import evenly_spaced, grid, plain_label, save_png, shown_names, titled_panels

_LIMIT = 2.0
"""Limit of the colour scale, as a logarithm to base 2: four times and a quarter of the even load."""

_TICKS = {-2: "1/4", -1: "1/2", 0: "even", 1: "2 x", 2: "4 x"}
_MOST_NUMBERED = 32
_MOST_MOMENTS = 6


def plot_load_history(
    loads: Mapping[str, Sequence[Sequence[float]]], moments: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Draw one heat map per layer of each expert's load over time, the busiest at the end on top.

    Args:
        loads: Loads by layer name, shares that sum to 1. Shape of each: (moments, num_experts). Of more than 16 layers,
            16 evenly spaced ones are drawn.
        moments: Name of each moment, such as a step or a checkpoint.
        path: Path of the PNG file.

    Raises:
        EvaluationError: If there are no layers or moments, or a layer lacks a moment.
    """
    if not loads or not moments or any(len(rows) != len(moments) for rows in loads.values()):
        raise EvaluationError("a history of loads needs layers, and the load of each layer at every moment")
    titles, left_out = shown_names(list(loads))
    arrays = {title: np.array(loads[name], dtype=float).T for title, name in titles.items()}
    rows, columns = grid(len(arrays))
    tallest = max(map(len, arrays.values()))
    height = 1.1 + 0.09 * max(tallest, 14) if tallest <= _MOST_NUMBERED else 2.4
    figure = Figure(figsize=(2.3 * columns + 1.2, height * rows + 0.9), layout="constrained")
    figure.suptitle(f"Load of each expert over time{left_out}", fontsize=11)
    axes = titled_panels(figure, rows, columns, arrays)
    for panel, load_ET in zip(axes.flat, arrays.values(), strict=False):
        order = np.argsort(-load_ET[:, -1], kind="stable")
        image = _draw(panel, load_ET[order] * len(load_ET))
        _number_experts(panel.set_yticks, order, size=6)
        _name_moments(panel, moments)
    figure.supylabel("expert, the busiest at the end on top", fontsize=9)
    _bar(figure, axes, image)
    return save_png(figure, path)


def plot_allocation(
    allocation: Mapping[str, Mapping[str, Sequence[float]]], top_k: Mapping[str, int], path: str | os.PathLike[str]
) -> Path:
    """Draw one heat map per layer of the experts that the tokens of each domain go to.

    Args:
        allocation: Share of the tokens that select each expert, by layer name, then by domain; see
            `diagnostics.routing_metrics.domain_allocation`. Of more than 16 layers, 16 evenly spaced ones are drawn.
        top_k: Experts per token, by layer name.
        path: Path of the PNG file.

    Returns:
        The path.

    Raises:
        EvaluationError: If there are no layers.
    """
    if not allocation:
        raise EvaluationError("no allocation to draw: there are no layers")
    titles, left_out = shown_names(list(allocation))
    num_domains = max(map(len, allocation.values()))
    rows, columns = _flat_grid(len(titles))
    figure = Figure(figsize=(3.4 * columns + 2.2, (0.24 * num_domains + 0.75) * rows + 0.9), layout="constrained")
    figure.suptitle(f"Experts by domain: share of its tokens over the even share{left_out}", fontsize=11)
    axes = titled_panels(figure, rows, columns, titles)
    for position, (panel, name) in enumerate(zip(axes.flat, titles.values(), strict=False)):
        share_DE = np.array(list(allocation[name].values()), dtype=float)
        image = _draw(panel, share_DE * share_DE.shape[1] / top_k[name])
        _number_experts(panel.set_xticks, np.arange(share_DE.shape[1]), size=6)
        domains = list(map(plain_label, allocation[name])) if position % columns == 0 else []
        panel.set_yticks(range(len(domains)), domains, fontsize=8)
    figure.supxlabel("expert", fontsize=9)
    _bar(figure, axes, image)
    return save_png(figure, path)


def _flat_grid(num_panels: int) -> tuple[int, int]:
    """Return rows and columns for wide panels, at most two next to each other."""
    columns = 1 if num_panels == 1 else 2
    return -(-num_panels // columns), columns


def _draw(axes: Axes, ratio: np.ndarray) -> AxesImage:
    """Draw ratios to the even load. A ratio of 0 is at the end of the scale."""
    logarithm = np.log2(np.maximum(ratio, 2.0 ** -(_LIMIT + 1)))
    axes.tick_params(length=0, pad=2)
    colors = matplotlib.colormaps["PuOr_r"]
    return axes.imshow(logarithm, cmap=colors, vmin=-_LIMIT, vmax=_LIMIT, aspect="auto", interpolation="nearest")


def _number_experts(set_ticks: "matplotlib.axis.Axis", order: np.ndarray, size: float) -> None:
    labels = [str(expert) for expert in order] if len(order) <= _MOST_NUMBERED else []
    set_ticks(range(len(labels)), labels, fontsize=size)  # type: ignore[operator]


def _name_moments(axes: Axes, moments: Sequence[str]) -> None:
    positions = evenly_spaced(len(moments), _MOST_MOMENTS)
    labels = [plain_label(moments[position]) for position in positions]
    longest = max(map(len, labels))
    turned: dict[str, Any] = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if longest * len(positions) > 22 else {}
    )
    axes.set_xticks(positions, labels, fontsize=7, **turned)


def _bar(figure: Figure, axes: np.ndarray, image: AxesImage) -> Colorbar:
    bar = figure.colorbar(image, ax=axes, extend="both", ticks=list(_TICKS), fraction=0.05, aspect=30)
    bar.ax.set_yticklabels(list(_TICKS.values()))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share over the even share", fontsize=9)
    return bar
