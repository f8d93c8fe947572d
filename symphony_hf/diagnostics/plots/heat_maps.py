"""Co-selection graphs and expert similarities as heat maps."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from symphony_hf.diagnostics.graph_metrics import cluster_order, leaf_order, load
from symphony_hf.errors import EvaluationError
from symphony_hf.routing.graph import transition_matrix

from .figure import grid, save_png, shown_layers, shown_names, titled_panels


def _percent(share: float, _: float) -> str:
    return f"{100 * share:g}%"


def _draw_load(axes: Axes, load_E: np.ndarray, top: float) -> None:
    axes.bar(range(len(load_E)), load_E, width=0.8, color="0.5")
    axes.axhline(1 / len(load_E), color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(-0.5, len(load_E) - 0.5), ylim=(0, top), xticks=[])
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.yaxis.set_major_formatter(_percent)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_pairs(axes: Axes, values_EE: np.ndarray, order: list[int], top: float, **style: Any) -> AxesImage:
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="0.8")
    image = axes.imshow(values_EE[np.ix_(order, order)], cmap=colors, vmin=0, vmax=top, **style)
    labels = [str(expert) for expert in order] if len(order) <= 32 else []
    size = np.interp(len(order), [16, 32], [7, 5])
    axes.set_xticks(range(len(labels)), labels, fontsize=size)
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.tick_params(length=0, pad=2)
    return image


def _neighbour_shares(adjacency_EE: Tensor) -> np.ndarray:
    """Return each expert's distribution over its partners, by row. The diagonal is NaN, which is drawn grey."""
    shares_EE = transition_matrix(adjacency_EE.detach().float().cpu(), self_loops=False).numpy()
    np.fill_diagonal(shares_EE, np.nan)
    return shares_EE


def plot_graphs(graphs: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw one heat map of co-selections per layer, below the experts' loads.

    Experts are in the order of `cluster_order`, so that communities show as blocks; more than 32 are not numbered. All
    layers share one colour scale, which ends at the 99th percentile, so that one pair does not leave all others pale.
    Of more than 16 layers, 16 evenly spaced ones are drawn.

    Raises:
        GraphError: If there are no graphs, or one is not a co-selection graph.
    """
    shown, left_out = shown_layers(graphs)
    loads = [load(adjacency_EE).numpy() for adjacency_EE in shown.values()]
    shares = [_neighbour_shares(adjacency_EE) for adjacency_EE in shown.values()]
    highest = 1.1 * max(load_E.max() for load_E in loads)
    all_shares = np.concatenate([shares_EE.ravel() for shares_EE in shares])
    # 1 if no expert has a partner yet: a colour scale needs a length.
    top = float(np.nanpercentile(all_shares, 99)) or float(np.nanmax(all_shares)) or 1.0
    rows, columns = grid(len(shown))
    figure = Figure(
        figsize=(2.7 * columns + 1.4, 3.1 * rows + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.03, hspace=0)
    )
    figure.suptitle(f"Experts selected together{left_out}", fontsize=11)
    cells = figure.add_gridspec(rows, columns + 1, width_ratios=[*[1] * columns, 0.06])
    for number, (title, adjacency_EE) in enumerate(shown.items()):
        halves = cells[number // columns, number % columns].subgridspec(2, 1, height_ratios=(1, 5))
        order = cluster_order(adjacency_EE)
        above = figure.add_subplot(halves[0])
        above.set_title(title, fontsize=9)
        _draw_load(above, loads[number][order], highest)
        image = _draw_pairs(figure.add_subplot(halves[1]), shares[number], order, top, aspect="auto")
    figure.supxlabel("partner (grey: the expert itself)\nabove: its load (dashed: even load)", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    extend = "max" if np.nanmax(all_shares) > top else "neither"
    bar = figure.colorbar(image, cax=figure.add_subplot(cells[:, -1]), extend=extend, format=_percent)
    bar.set_label("share among the expert's partners", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return save_png(figure, path)


def plot_similarity(matrices: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw one heat map per layer of the similarity of experts' outputs on the same tokens.

    Similar experts are next to each other; more than 32 are not numbered. The colour scale ends at the highest
    similarity of two different experts.

    Args:
        matrices: Similarities by layer name, see `diagnostics.routing_metrics.cka_matrix`. Shape of each: (num_experts,
            num_experts). Of more than 16 layers, 16 evenly spaced ones are drawn.
        path: Path of the PNG file.

    Returns:
        The path.

    Raises:
        EvaluationError: If there are no similarities.
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
    figure.suptitle(f"Similarity of experts' outputs on the same tokens (CKA){left_out}", fontsize=11)
    axes = titled_panels(figure, rows, columns, arrays)
    for panel, array in zip(axes.flat, arrays.values(), strict=False):
        image = _draw_pairs(panel, array, leaf_order(1.0 - np.nan_to_num(array, nan=1.0).clip(max=1.0)), top)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("similarity of two experts", fontsize=9)
    return save_png(figure, path)
