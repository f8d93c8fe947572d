"""Figure of the losses of a model and of two copies of it that are fine-tuned on the same batches."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import CURVES, draw_curve, finish_curves
from .figure import COLORS, plain_label, save_png

Points = Sequence[tuple[float, float]]


def plot_copies(
    base: Mapping[str, Points], copies: Mapping[str, Mapping[str, Points]], path: str | os.PathLike[str]
) -> Path:
    """Draw the loss by step while pre-training, while fine-tuning two copies, and the difference of the copies.

    The copies' losses are close to each other beside what training changes, so that one curve may hide the other: the
    difference, at the steps of both, has a panel of its own. The upper panels are of training losses, the lower of
    evaluation losses.

    Args:
        base: Losses while pre-training by `train` or `eval`, as pairs of (step, loss in nats per token).
        copies: The same for each of the two copies, by name. The difference is the second minus the first.
        path: Path of the PNG file.

    Returns:
        The path.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(len(CURVES), 3)
    for (pre_training, fine_tuning, difference), name in zip(panels, CURVES, strict=True):
        if points := base.get(name):
            draw_curve(pre_training, 0, "base", name, points)
        for number, (copy, by_name) in enumerate(copies.items()):
            if points := by_name.get(name):
                draw_curve(fine_tuning, number + 1, plain_label(copy), name, points)
        _draw_difference(difference, name, *(by_name.get(name, ()) for by_name in copies.values()))
        for axes in (pre_training, fine_tuning, difference):
            finish_curves(axes, name)
        difference.set_ylabel("difference (nats per token)")
    first, second = map(plain_label, copies)
    for axes, title in zip(panels[0], ("pre-training", "fine-tuning", f"{second} minus {first}"), strict=True):
        axes.set_title(title, fontsize=10)
    return save_png(figure, path)


def _draw_difference(axes: Axes, name: str, first: Points, second: Points) -> None:
    before = dict(first)
    points = [(step, loss - before[step]) for step, loss in second if step in before]
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    if points:
        steps, differences = zip(*points, strict=True)
        marker = "o" if name == "eval" else None
        label = f"last {differences[-1]:+.4f}"
        axes.plot(steps, differences, label=label, color=COLORS[3], marker=marker, markersize=4, linewidth=1.5)
