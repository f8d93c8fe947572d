"""How alike the experts of a layer are, as heat maps."""

import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ...errors import EvaluationError
from ..graph_metrics import leaf_order
from .figure import grid, save_png, shown_names


def plot_similarity(matrices: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw one heat map a layer: how alike two experts are in what they make of the same tokens.

    Like ones are next to each other; beyond 32 experts go unnumbered. The colour scale ends at the highest similarity
    of two different experts.

    Args:
        matrices: By layer name, see `diagnostics.cka_matrix`. Shape of each: (num_experts, num_experts). Of more than
            16 layers, 16 evenly spaced ones are drawn.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        EvaluationError: If there is none.
    """
    if not matrices:
        raise EvaluationError("no similarities to draw")
    titles, left_out = shown_names(list(matrices))
    arrays = {title: matrices[name].double().numpy().copy() for title, name in titles.items()}
    for array in arrays.values():
        np.fill_diagonal(array, np.nan)
    top = max(0.05, *(float(np.nanmax(array)) for array in arrays.values()))
    rows, columns = grid(len(arrays))
    figure = Figure(figsize=(2.5 * columns + 1.2, 2.6 * rows + 0.7), layout="constrained")
    figure.suptitle(f"Experts that make the same of the same tokens (CKA){left_out}", fontsize=11)
    axes = np.array(figure.subplots(rows, columns, squeeze=False))
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="0.8")
    for panel, (title, array) in zip(axes.flat, arrays.items(), strict=False):
        order = leaf_order(1.0 - np.nan_to_num(array, nan=1.0).clip(max=1.0))
        image = panel.imshow(array[np.ix_(order, order)], cmap=colors, vmin=0, vmax=top)
        labels = [str(expert) for expert in order] if len(order) <= 32 else []
        size = float(np.interp(len(order), [16, 32], [7, 5]))
        panel.set_xticks(range(len(labels)), labels, fontsize=size)
        panel.set_yticks(range(len(labels)), labels, fontsize=size)
        panel.tick_params(length=0, pad=2)
        panel.set_title(title, fontsize=9)
    for panel in axes.flat[len(arrays) :]:
        panel.set_axis_off()
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("similarity of two experts", fontsize=9)
    return save_png(figure, path)
