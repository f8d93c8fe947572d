"""Figures of one panel each, as SVG: a page sets them side by side where it is wide, else one below the other."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...errors import EvaluationError, nearest
from .figure import COLORS, as_svg, plain_label
from .runs import CURVES, LINES, MARKERS, draw_curve, finish_curves

Ends = tuple[float, float | None, float | None]
"""A value, and the ends of its interval where it has one."""


def _panel(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lengths(values: Sequence[Ends]) -> list[list[float]]:
    """Below and above each value; 0 where no interval is known, and where rounding put an end past the value."""
    known = [(value, value if low is None else low, value if high is None else high) for value, low, high in values]
    return [[max(value - low, 0.0) for value, low, _ in known], [max(high - value, 0.0) for value, _, high in known]]


def _spread_wide(values: Sequence[float]) -> bool:
    """Whether only a logarithmic axis shows the small ones apart."""
    return min(values) > 0 and max(values) > 20 * min(values)


def draw_losses(curves: Mapping[str, Sequence[tuple[float, float]]], name: str) -> bytes:
    """The losses of several models by step.

    Args:
        curves: By model: pairs of (step, loss in nats a token), at least one.
        name: `train` or `eval`.

    Returns:
        An SVG.

    Raises:
        EvaluationError: If the name is another.
    """
    if name not in CURVES:
        raise EvaluationError(f"unknown curve `{name}`; {nearest(name, CURVES)}")
    figure, axes = _panel()
    for number, (model, points) in enumerate(curves.items()):
        draw_curve(axes, number, plain_label(model), name, points)
    finish_curves(axes, name)
    return as_svg(figure)


def draw_levels(levels: Mapping[str, Mapping[str, Ends]], metric: str, percent: bool = False) -> bytes:
    """What was measured of several models, a line each, with the intervals that are known.

    Args:
        levels: By model, then by text (`clean`, `attacked`): value and interval.
        metric: What they are, as the axis has it.
        percent: Whether they are shares.

    Returns:
        An SVG.
    """
    texts = list(dict.fromkeys(text for by_text in levels.values() for text in by_text))
    figure, axes = _panel(1.1 + 0.3 * len(levels) + 0.12 * len(levels) * (len(texts) - 1))
    for number, text in enumerate(texts):
        shift = 0.22 * (number - (len(texts) - 1) / 2)
        label: str | None = plain_label(text)
        for place, by_text in enumerate(levels.values()):
            if text not in by_text:
                continue
            ends = by_text[text]
            style: dict[str, Any] = {"color": COLORS[number % 6], "marker": MARKERS[number % 6], "markersize": 5}
            axes.errorbar(
                [ends[0]], [place + shift], xerr=_lengths([ends]), capsize=3, linestyle="", label=label, **style
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
    """How several models fare as an attack grows more severe.

    Args:
        curves: By model, then by severity: what was measured. Severity 0 is clean text.
        attack: Its name, for the title.
        metric: What was measured, as the axis has it.
        limits: Of the axis, so that several attacks can be drawn to one scale.

    Returns:
        An SVG.
    """
    figure, axes = _panel(3.2)
    severities = sorted({severity for by_severity in curves.values() for severity in by_severity})
    for number, (model, by_severity) in enumerate(curves.items()):
        places = sorted(by_severity)
        values = [by_severity[place] for place in places]
        shift = 0.08 * (number - (len(curves) - 1) / 2)  # so that intervals do not hide each other
        axes.errorbar(
            [place + shift for place in places],
            [value for value, _, _ in values],
            _lengths(values),
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
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or low + 1)
    axes.set(xlabel="severity", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    return as_svg(figure)
