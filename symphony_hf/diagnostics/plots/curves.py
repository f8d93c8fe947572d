"""Figures of losses by step, of levels with intervals, and of metrics by severity of an attack."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from symphony_hf.errors import EvaluationError, nearest

from .figure import COLORS, as_svg, plain_label, save_png

CURVES = {"train": "training loss", "eval": "evaluation loss"}
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":")


class HasInterval(Protocol):
    """The drawn part of an `evaluation.statistics.Interval`, which this room must not import."""

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
    """Draw the loss by step of several models, with a panel for training and one for evaluation.

    Losses are given by model, then by `train` or `eval`, as pairs of (step, loss in nats per token). Either may be
    missing or empty; another name raises EvaluationError.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = dict(zip(CURVES, figure.subplots(1, 2), strict=True))
    for number, (model, by_name) in enumerate(curves.items()):
        for name, points in by_name.items():
            if name not in CURVES:
                raise EvaluationError(f"curves of {model}: unknown curve `{name}`; {nearest(name, CURVES)}")
            if not points:
                continue
            draw_curve(panels[name], number, plain_label(model), name, points)
    for name, axes in panels.items():
        finish_curves(axes, name)
    return save_png(figure, path)


def draw_curve(axes: Axes, number: int, model: str, name: str, points: Sequence[tuple[float, float]]) -> None:
    """Draw the losses of one model, with markers for evaluation losses, which are few."""
    steps, losses = zip(*points, strict=True)
    style: dict[str, Any] = {"color": COLORS[number % 6], "linestyle": LINES[number % 4], "linewidth": 1.5}
    marker = MARKERS[number % 6] if name == "eval" else None
    axes.plot(steps, losses, label=f"{model}, last {losses[-1]:.3f}", marker=marker, markersize=4, **style)


def finish_curves(axes: Axes, name: str) -> None:
    """Set the axes, grid and legend of a panel of curves."""
    axes.set(xlabel="step", ylabel=f"{CURVES[name]} (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, frameon=False)


def _draw_intervals(
    axes: Axes, positions: Sequence[float], intervals: Iterable[HasInterval], number: int, label: str | None = None
) -> None:
    ends = [(interval.estimate, interval.low, interval.high) for interval in intervals]
    style: dict[str, Any] = {"color": COLORS[number % 6], "marker": MARKERS[number % 6], "linestyle": "", "capsize": 4}
    axes.errorbar(positions, [estimate for estimate, _, _ in ends], lengths(ends), label=label, **style)


def plot_comparison(
    perplexities: Mapping[str, Mapping[str, HasInterval]],
    ratios: Mapping[str, HasInterval],
    path: str | os.PathLike[str],
) -> Path:
    """Draw the perplexity of each model on each text, and paired ratios of models, with their intervals.

    Most of a perplexity's interval is the variety of the documents, which the models share: intervals may overlap where
    the paired ratio is clearly not 1.

    Args:
        perplexities: Perplexities by model, then by text ("clean", "attacked"), such as those of
            `evaluation.comparison.perplexity_interval`.
        ratios: Ratios by what is compared ("symphony / plain, clean"), such as the `.exp()` of
            `evaluation.comparison.compare_perplexity`.
        path: Path of the PNG file.

    Raises:
        EvaluationError: If there are no models or no ratios.
    """
    if not perplexities or not ratios:
        raise EvaluationError("a comparison needs the perplexities of at least one model, and at least one ratio")
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    texts = list(dict.fromkeys(text for by_text in perplexities.values() for text in by_text))
    for number, (model, by_text) in enumerate(perplexities.items()):
        shift = 0.15 * (number - (len(perplexities) - 1) / 2)
        positions = [texts.index(text) + shift for text in by_text]
        _draw_intervals(left, positions, by_text.values(), number, plain_label(model))
    _draw_intervals(right, range(len(ratios)), ratios.values(), number=len(perplexities))
    left.legend(frameon=False, fontsize=9)
    left.set_xticks(range(len(texts)), list(map(plain_label, texts)))
    right.set_xticks(range(len(ratios)), [_in_lines(label) for label in ratios])
    right.axhline(1, color="black", linewidth=0.8, linestyle="--")
    left.set(title="each model", ylabel="perplexity", xlim=(-0.5, len(texts) - 0.5))
    right.set(
        title="models in pairs (dashed: no difference)", ylabel="ratio of perplexities", xlim=(-0.5, len(ratios) - 0.5)
    )
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    any_ratio = next(iter(ratios.values()))
    note = f"bars: {any_ratio.confidence:.0%} intervals over {any_ratio.num_documents} documents"
    figure.supxlabel(note, fontsize=9)
    return save_png(figure, path)


def _in_lines(label: str) -> str:
    return "\n".join(map(plain_label, label.split(", ")))


Ends = tuple[float, float | None, float | None]
"""A value, and the ends of its interval, if known."""


def _panel(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def lengths(values: Sequence[Ends]) -> list[list[float]]:
    """Return the lengths below and above each value; 0 without an interval or where rounding makes it negative."""
    known = [(value, value if low is None else low, value if high is None else high) for value, low, high in values]
    return [[max(value - low, 0.0) for value, low, _ in known], [max(high - value, 0.0) for value, _, high in known]]


def _spread_wide(values: Sequence[float]) -> bool:
    """Whether only a logarithmic axis separates the small values."""
    return min(values) > 0 and max(values) > 20 * min(values)


def draw_losses(curves: Mapping[str, Sequence[tuple[float, float]]], name: str) -> bytes:
    """Draw the losses of several models by step.

    Args:
        curves: Losses by model: pairs of (step, loss in nats per token), at least one.
        name: `train` or `eval`.

    Returns:
        An SVG.

    Raises:
        EvaluationError: If the name is unknown.
    """
    if name not in CURVES:
        raise EvaluationError(f"unknown curve `{name}`; {nearest(name, CURVES)}")
    figure, axes = _panel()
    for number, (model, points) in enumerate(curves.items()):
        draw_curve(axes, number, plain_label(model), name, points)
    finish_curves(axes, name)
    return as_svg(figure)


def draw_levels(levels: Mapping[str, Mapping[str, Ends]], metric: str, percent: bool = False) -> bytes:
    """Draw the levels of several models on each text, one line each, with their intervals if known, as an SVG."""
    texts = list(dict.fromkeys(text for by_text in levels.values() for text in by_text))
    figure, axes = _panel(1.1 + 0.3 * len(levels) + 0.12 * len(levels) * (len(texts) - 1))
    for number, text in enumerate(texts):
        shift = 0.22 * (number - (len(texts) - 1) / 2)
        label: str | None = plain_label(text)
        for position, by_text in enumerate(levels.values()):
            if text not in by_text:
                continue
            ends = by_text[text]
            style: dict[str, Any] = {"color": COLORS[number % 6], "marker": MARKERS[number % 6], "markersize": 5}
            axes.errorbar(
                [ends[0]], [position + shift], xerr=lengths([ends]), capsize=3, linestyle="", label=label, **style
            )
            label = None  # one entry of the legend for each text
    axes.set_yticks(range(len(levels)), [plain_label(model, 28) for model in levels], fontsize=9)
    axes.set(xlabel=metric, ylim=(len(levels) - 0.5, -0.5))
    if _spread_wide([value for by_text in levels.values() for value, _, _ in by_text.values()]):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4 if percent else 6))  # 87.50% is a wide label
        if percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return as_svg(figure)


def draw_attack(
    curves: Mapping[str, Mapping[int, Ends]], attack: str, metric: str, limits: tuple[float, float]
) -> bytes:
    """Draw a metric of several models by the severity of an attack, as an SVG. Severity 0 is clean text.

    `limits` are those of the axis, so that several attacks can be drawn to one scale.
    """
    figure, axes = _panel(3.2)
    severities = sorted({severity for by_severity in curves.values() for severity in by_severity})
    for number, (model, by_severity) in enumerate(curves.items()):
        positions = sorted(by_severity)
        values = [by_severity[position] for position in positions]
        shift = 0.08 * (number - (len(curves) - 1) / 2)  # so that intervals do not hide each other
        axes.errorbar(
            [position + shift for position in positions],
            [value for value, _, _ in values],
            lengths(values),
            label=plain_label(model),
            color=COLORS[number % 6],
            marker=MARKERS[number % 6],
            linestyle=LINES[number % 4],
            markersize=5,
            capsize=3,
        )
    axes.set_title(plain_label(attack), fontsize=10)
    axes.set_xticks(severities, ["clean" if severity == 0 else str(severity) for severity in severities])
    low, high = limits
    if _spread_wide(limits):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="severity", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    return as_svg(figure)
