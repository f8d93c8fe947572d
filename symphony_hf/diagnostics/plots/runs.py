"""How runs went and ended: their losses by step, and their perplexities, clean against attacked."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...errors import EvaluationError, nearest
from .figure import COLORS, save_png

CURVES = {"train": "training loss", "eval": "evaluation loss"}
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":")


class HasInterval(Protocol):
    """What is drawn of an `evaluation.Interval`, which lives on the same level and is not imported."""

    @property
    def estimate(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def confidence(self) -> float: ...

    @property
    def num_documents(self) -> int: ...


def plot_curves(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: str | os.PathLike[str]
) -> Path:
    """Draw the loss by step of several models, training and evaluation in a panel each.

    Args:
        curves: By model, then by `train` or `eval`: pairs of (step, loss in nats a token). Either may be missing
            or empty.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        EvaluationError: If a curve is neither `train` nor `eval`.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = dict(zip(CURVES, figure.subplots(1, 2), strict=True))
    for number, (model, by_name) in enumerate(curves.items()):
        for name, points in by_name.items():
            if name not in CURVES:
                raise EvaluationError(f"curves of {model}: unknown curve `{name}`; {nearest(name, CURVES)}")
            if not points:
                continue
            draw_curve(panels[name], number, model, name, points)
    for name, axes in panels.items():
        finish_curves(axes, name)
    return save_png(figure, path)


def draw_curve(axes: Axes, number: int, model: str, name: str, points: Sequence[tuple[float, float]]) -> None:
    """One model's losses, in the style of its number; with markers for an evaluation's, which are few."""
    steps, losses = zip(*points, strict=True)
    style: dict[str, Any] = {"color": COLORS[number % 6], "linestyle": LINES[number % 4], "linewidth": 1.5}
    marker = MARKERS[number % 6] if name == "eval" else None
    axes.plot(steps, losses, label=f"{model}, last {losses[-1]:.3f}", marker=marker, markersize=4, **style)


def finish_curves(axes: Axes, name: str) -> None:
    """Axes, grid and legend of a panel of curves."""
    axes.set(xlabel="step", ylabel=f"{CURVES[name]} (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=9, frameon=False)


def _draw_intervals(
    axes: Axes, places: Sequence[float], intervals: Iterable[HasInterval], number: int, label: str | None = None
) -> None:
    estimate, low, high = np.array([[interval.estimate, interval.low, interval.high] for interval in intervals]).T
    style: dict[str, Any] = {"color": COLORS[number % 6], "marker": MARKERS[number % 6], "linestyle": "", "capsize": 4}
    # Of an interval without width, rounding may put an end past the estimate.
    lengths = np.maximum([estimate - low, high - estimate], 0)
    axes.errorbar(places, estimate, lengths, label=label, **style)


def plot_comparison(
    perplexities: Mapping[str, Mapping[str, HasInterval]],
    ratios: Mapping[str, HasInterval],
    path: str | os.PathLike[str],
) -> Path:
    """Draw the perplexity of each model on each text, and how the models compare in pairs, with their intervals.

    The two panels belong together. Intervals of a perplexity are mostly the documents' own variety, which models
    share: they may overlap where the paired ratio is clearly not 1.

    Args:
        perplexities: By model, then by text ("clean", "attacked"): `evaluation.perplexity_interval`.
        ratios: By what is compared ("symphony / plain, clean"): `evaluation.compare_perplexity(...).exp()`.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        EvaluationError: If there is no model or no ratio.
    """
    if not perplexities or not ratios:
        raise EvaluationError("a comparison needs the perplexities of at least one model, and at least one ratio")
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    texts = list(dict.fromkeys(text for by_text in perplexities.values() for text in by_text))
    for number, (model, by_text) in enumerate(perplexities.items()):
        shift = 0.15 * (number - (len(perplexities) - 1) / 2)
        places = [texts.index(text) + shift for text in by_text]
        _draw_intervals(left, places, by_text.values(), number, model)
    _draw_intervals(right, range(len(ratios)), ratios.values(), number=len(perplexities))
    left.legend(frameon=False, fontsize=9)
    left.set_xticks(range(len(texts)), texts)
    right.set_xticks(range(len(ratios)), [label.replace(", ", "\n") for label in ratios])
    right.axhline(1, color="black", linewidth=0.8, linestyle="--")
    left.set(title="each model", ylabel="perplexity", xlim=(-0.5, len(texts) - 0.5))
    right.set(title="models in pairs (dashed: alike)", ylabel="ratio of perplexities", xlim=(-0.5, len(ratios) - 0.5))
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    any_ratio = next(iter(ratios.values()))
    note = f"bars: {any_ratio.confidence:.0%} intervals over {any_ratio.num_documents} documents"
    figure.supxlabel(note, fontsize=9)
    return save_png(figure, path)
