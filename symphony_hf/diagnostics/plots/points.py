"""Variants beside what they are compared with: ratios and differences with intervals over seeds, one line each."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...errors import EvaluationError
from .figure import COLORS, save_png

_PANELS = (
    ("clean", "clean perplexity\nover no graph's", 1.0, 1.0),
    ("attacked", "attacked perplexity\nover no graph's", 1.0, 1.0),
    ("routing_kept", "routing kept,\npoints more than no graph", 0.0, 100.0),
)
"""Measure, title, where the two are alike, scale."""


def plot_points(points: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Draw each variant's comparisons, one row a variant and one panel a measure.

    Args:
        points: By variant, then by `clean`, `attacked` (ratios) and `routing_kept` (difference of shares):
            `estimate`, and `low` and `high`, which are None where there is one seed.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        EvaluationError: If there is no variant.
    """
    if not points:
        raise EvaluationError("no variants to plot: a study needs at least one point beside its plain system")
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(points)), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for number, (axes, (measure, title, alike, scale)) in enumerate(zip(panels, _PANELS, strict=True)):
        _draw(axes, [values[measure] for values in points.values()], scale, COLORS[number])
        axes.axvline(alike, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_yticks(range(len(points)), list(points), fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("bars: 95% t-intervals over seeds; dashed: alike", fontsize=9)
    return save_png(figure, path)


def _draw(axes: Axes, intervals: list[Mapping[str, Any]], scale: float, color: str) -> None:
    for row, interval in enumerate(intervals):
        estimate = scale * interval["estimate"]
        if interval["low"] is not None:
            axes.plot([scale * interval["low"], scale * interval["high"]], [row, row], color=color, linewidth=1.5)
        axes.plot(estimate, row, marker="o", color=color, markersize=4)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
