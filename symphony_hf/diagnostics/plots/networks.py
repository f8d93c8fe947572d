"""The graphs of experts as networks: which experts seek each other?"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..graph_metrics import cluster_order, coselection_lift, load
from .figure import COLORS, grid, save_png, shown_layers

MIN_LIFT = 1.25
"""Pairs chosen together more than this many times as often as their loads would give are worth a line."""


def strongest_edges(adjacency_EE: Tensor) -> list[tuple[int, int, float]]:
    """The 2 E pairs (j, k, lift) that are chosen together most above what their loads give, and clearly above it.

    Ranked by the excess over the expected, not by lift: the lift of two rare experts is mostly chance.
    """
    lift_EE = coselection_lift(adjacency_EE)
    adjacency_EE = adjacency_EE.detach().double().cpu()
    excess_EE = torch.where(lift_EE > 1, adjacency_EE * (1 - 1 / lift_EE), 0.0)
    j, k = torch.triu_indices(len(lift_EE), len(lift_EE), offset=1)
    kept = excess_EE[j, k].argsort(descending=True)[: 2 * len(lift_EE)]
    pairs = zip(j[kept].tolist(), k[kept].tolist(), lift_EE[j, k][kept].tolist(), strict=True)
    return [(j, k, lift) for j, k, lift in pairs if lift > MIN_LIFT]


def edge_style(lift: float, top: float, scale: float = 1.0) -> dict[str, Any]:
    strength = (lift - 1) / (top - 1)
    return {"color": COLORS[0], "linewidth": scale * (0.4 + 3.6 * strength), "alpha": 0.25 + 0.75 * strength}


def _draw_network(axes: Axes, adjacency_EE: Tensor, edges: list[tuple[int, int, float]], top: float) -> None:
    num_experts = len(adjacency_EE)
    angle_E = np.empty(num_experts)
    # Clockwise from the top, neighbours on the circle being neighbours in the clustering.
    angle_E[cluster_order(adjacency_EE)] = np.pi / 2 - 2 * np.pi * np.arange(num_experts) / num_experts
    x_E, y_E = np.cos(angle_E), np.sin(angle_E)
    for j, k, lift in edges:
        axes.plot(x_E[[j, k]], y_E[[j, k]], **edge_style(lift, top, scale=min(1.0, 4 / math.sqrt(num_experts))))
    axes.scatter(x_E, y_E, s=1000 * load(adjacency_EE).numpy(), color=COLORS[1], linewidth=0, zorder=3)
    if num_experts <= 64:
        for expert in range(num_experts):
            axes.text(1.2 * x_E[expert], 1.2 * y_E[expert], str(expert), ha="center", va="center", fontsize=7)
    if not edges:
        axes.text(0, 0, "no pair stands out", ha="center", va="center", fontsize=8, color="0.4")
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    axes.set_axis_off()


def plot_expert_network(graphs: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw one circle of experts a layer, joined where they are chosen together more than their loads would give.

    A node's area is the expert's load; an edge's width and opacity its lift (`coselection_lift`), on one scale for
    all layers. Of each layer at most 2 E edges are drawn, so a missing edge is no sign of avoidance.

    Args:
        graphs: Adjacency by layer name. Shape of each: (num_experts, num_experts). Of more than 16 layers, 16
            evenly spaced ones are drawn.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        GraphError: If there is none, or one is no social graph.
    """
    shown, left_out = shown_layers(graphs)
    edges = [strongest_edges(adjacency_EE) for adjacency_EE in shown.values()]
    # At least 2, so that a graph with nothing but faint preferences looks faint.
    top = max([2.0, *(lift for layer in edges for _, _, lift in layer)])
    rows, columns = grid(len(shown))
    side = np.interp(max(map(len, shown.values())), [16, 64], [2.6, 3.8])
    figure = Figure(figsize=(max(5.6, side * columns), (side + 0.3) * rows + 0.8), layout="constrained")
    figure.suptitle(f"Experts chosen together beyond their loads{left_out}", fontsize=11)
    for number, (title, adjacency_EE) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(title, fontsize=9)
        _draw_network(axes, adjacency_EE, edges[number], top)
    lifts = [1 + share * (top - 1) for share in (0.2, 0.5, 1.0)]
    handles = [Line2D([], [], label=f"{lift:.1f} x expected", **edge_style(lift, top)) for lift in lifts]
    handles.append(Line2D([], [], marker="o", linestyle="", color=COLORS[1], label="area: load"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save_png(figure, path)
