"""What `symphony eval` found, as curves: clean against attacked, with intervals."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...errors import EvaluationError
from ..names import short_names
from .figure import COLORS, save_png
from .runs import LINES, MARKERS

_MOST_COLUMNS = 4
_CHANGES = {"ratio": ("attacked / clean", 1), "difference": ("attacked - clean", 0)}
"""What an attack makes of a level: in words, and its value where it makes nothing of it."""


def plot_robustness(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw perplexity or accuracy, and what attacks make of it, by severity: a column an attack, a curve a model.

    Args:
        result: Of `robustness.evaluate_robustness`, as in its `result.json`.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        EvaluationError: If it has no attacks.
    """
    models = {role: result["models"][role] for role in ("model", "against") if role in result["models"]}
    attacks = list(dict.fromkeys(row["attack"] for row in models["model"]["attacks"]))
    if not attacks:
        raise EvaluationError("an evaluation without attacks has no curves")
    level, change = (result["measure"][name] for name in ("level", "change"))
    in_words, nothing = _CHANGES[change]
    columns = min(len(attacks), _MOST_COLUMNS)
    bands = -(-len(attacks) // columns)
    figure = Figure(figsize=(2.5 * columns + 0.9, 3.9 * bands + 0.7), layout="constrained")
    names = short_names([result["settings"][role] for role in models])
    axes = figure.subplots(2 * bands, columns, squeeze=False, sharex=True)
    for place, attack in enumerate(attacks):
        band, column = divmod(place, columns)
        for row, (measure, label) in enumerate({level: level, change: in_words}.items()):
            panel = axes[2 * band + row, column]
            for number, (name, model) in enumerate(zip(names, models.values(), strict=True)):
                _draw(panel, model, attack, measure, number, len(models), name)
            if measure == change:
                panel.axhline(nothing, color="0.4", linewidth=0.8)
            if column == 0:
                panel.set_ylabel(label, fontsize=9)
        axes[2 * band, column].set_title(attack, fontsize=9)
        axes[2 * band + 1, column].set_xlabel("severity (0: clean)", fontsize=9)
        axes[2 * band + 1, column].tick_params(labelbottom=True)
    for panel in axes.flat:
        if not panel.has_data():
            panel.set_axis_off()
    _share_scales(axes, len(attacks), columns)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9, frameon=False)
    confidence, documents = models["model"]["clean"][level]["confidence"], result["documents"]
    note = f"bars: {confidence:.0%} intervals over {documents['number']} {documents['unit']}, which models share"
    figure.supxlabel(note, fontsize=8)
    return save_png(figure, path)


def _draw(
    axes: Axes, model: Mapping[str, Any], attack: str, measure: str, number: int, num_models: int, name: str
) -> None:
    points = {0: model["clean"][measure]} if measure in model["clean"] else {}
    own = [row for row in model["attacks"] if row["attack"] == attack and row["severity"] is not None]
    points |= {row["severity"]: row[measure] for row in own}
    estimate, low, high = np.array([[p["estimate"], p["low"], p["high"]] for p in points.values()]).T
    places = np.array(list(points)) + 0.12 * (number - (num_models - 1) / 2)
    # Of an interval without width, rounding may put an end past the estimate.
    lengths = np.maximum([estimate - low, high - estimate], 0)
    style: dict[str, Any] = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": LINES[number]}
    axes.errorbar(places, estimate, lengths, label=name, capsize=3, markersize=4, linewidth=1.3, **style)
    axes.set_xticks(range(6))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _share_scales(axes: np.ndarray, num_attacks: int, columns: int) -> None:
    """One scale for each measure, so that attacks can be compared."""
    for row in range(2):
        own = [axes[2 * (place // columns) + row, place % columns] for place in range(num_attacks)]
        limits = np.array([panel.get_ylim() for panel in own])
        for panel in own:
            panel.set_ylim(limits[:, 0].min(), limits[:, 1].max())
