"""Figures of robustness and routing under attack, and of router saturation."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from symphony_hf.diagnostics.labels import model_names
from symphony_hf.errors import EvaluationError

from .curves import LINES, MARKERS, lengths
from .figure import COLORS, plain_label, save_png, shown_names

_MOST_COLUMNS = 4
_CHANGES = {"ratio": ("attacked / clean", 1), "difference": ("attacked - clean", 0)}
"""Label of each change of a level, and its value without a change."""
_LEVELS = {"perplexity": "perplexity per token", "accuracy": "accuracy"}
"""Label of each level."""


def plot_robustness(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw perplexity or accuracy, and its change under attack, by severity: a column per attack, a curve per model.

    Raises EvaluationError if the result of `evaluate_robustness` has no attacks.
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
    names = model_names(result["settings"], list(models))
    axes = figure.subplots(2 * bands, columns, squeeze=False, sharex=True)
    for position, attack in enumerate(attacks):
        band, column = divmod(position, columns)
        for row, (measure, label) in enumerate({level: _LEVELS[level], change: in_words}.items()):
            panel = axes[2 * band + row, column]
            for number, (role, model) in enumerate(models.items()):
                _draw(panel, model, attack, measure, number, len(models), names[role])
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
    sample = f"{documents['number']} {documents['unit']}"
    each = f"over {sample}" if len(models) == 1 else f"of each model over the same {sample}"
    note = f"bars: {confidence:.0%} intervals {each}"
    if result.get("comparisons", {}).get("unit", "token") != "token":
        note += "\nthe models' tokens differ, so these perplexities do not compare"
    figure.supxlabel(note, fontsize=8)
    return save_png(figure, path)


def _draw(
    axes: Axes, model: Mapping[str, Any], attack: str, measure: str, number: int, num_models: int, name: str
) -> None:
    points = {0: model["clean"][measure]} if measure in model["clean"] else {}
    own = [row for row in model["attacks"] if row["attack"] == attack and row["severity"] is not None]
    points |= {row["severity"]: row[measure] for row in sorted(own, key=lambda row: row["severity"])}
    ends = [(point["estimate"], point["low"], point["high"]) for point in points.values()]
    positions = np.array(list(points)) + 0.12 * (number - (num_models - 1) / 2)
    estimates = [estimate for estimate, _, _ in ends]
    style: dict[str, Any] = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": LINES[number]}
    style |= {"label": plain_label(name), "capsize": 3, "markersize": 4, "linewidth": 1.3}
    axes.errorbar(positions, estimates, lengths(ends), **style)
    axes.set_xticks(range(6))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _share_scales(axes: np.ndarray, num_attacks: int, columns: int) -> None:
    """Use one scale for each measure, so that attacks can be compared."""
    for row in range(2):
        own = [axes[2 * (position // columns) + row, position % columns] for position in range(num_attacks)]
        limits = np.array([panel.get_ylim() for panel in own])
        for panel in own:
            panel.set_ylim(limits[:, 0].min(), limits[:, 1].max())


_MOST_WRITTEN = 16
"""Maximum number of layers with a number in each cell."""


def plot_flips(
    panels: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[float | None]]]],
    title: str,
    path: str | os.PathLike[str],
) -> Path:
    """Draw the flip rate of each layer by severity, by distance from the attack, and by kind of token.

    Args:
        panels: Column names, and flip rates by layer name, for each kind of columns (such as "severity"). A rate is
            None where there are no tokens. All panels have the same layers.
        title: Title of the figure.
        path: Path of the PNG file.

    Raises:
        EvaluationError: If there are no panels, or none has a number.
    """
    values = [v for _, rows in panels.values() for row in rows.values() for v in row if v is not None]
    if not values:
        raise EvaluationError("no flip rates to draw: nothing was attacked")
    layers = list(next(iter(panels.values()))[1])
    titles, left_out = shown_names(layers, most=48)
    widths = [max(len(names), 2) for names, _ in panels.values()]
    figure = Figure(figsize=(0.52 * sum(widths) + 2.6, 0.27 * max(len(titles), 5) + 1.7), layout="constrained")
    figure.suptitle(f"{title}{left_out}", fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    top = max(values) or 1.0
    for position, (what, (names, rows)) in enumerate(panels.items()):
        cells = np.array([rows[name] for name in titles.values()], dtype=float)
        image = _draw_plan(axes[position], cells, names, top)
        axes[position].set_xlabel(what, fontsize=9)
        axes[position].set_yticks(range(len(titles)), list(titles) if position == 0 else [""] * len(titles), fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, format=lambda value, _: f"{100 * value:g}%")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("flip rate", fontsize=9)
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
    """Draw the share of the final routing that each checkpoint has, with one curve per layer.

    Args:
        saturation: Saturation by layer name, see `diagnostics.routing_metrics.router_saturation`. Shape of each:
            (checkpoints,).
        moments: Name of each checkpoint.
        path: Path of the PNG file.
        chance: Saturation of random selection, K / E; not drawn if None.

    Returns:
        The path.

    Raises:
        EvaluationError: If there are fewer than two checkpoints, or a layer lacks one.
    """
    if len(moments) < 2 or not saturation or any(len(row) != len(moments) for row in saturation.values()):
        raise EvaluationError(
            "a saturation curve needs at least two checkpoints, and a value of each layer at every one"
        )
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
    axes.set_xticks(range(len(moments)), list(map(plain_label, moments)), fontsize=8, **turned)
    axes.set(ylim=(0, 1.03), ylabel="selections that match the last checkpoint")
    axes.set_title(f"Router saturation{left_out}", fontsize=11)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save_png(figure, path)
