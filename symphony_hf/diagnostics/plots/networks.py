"""Co-selection graphs as networks."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from symphony_hf.diagnostics.graph_metrics import cluster_order, communities, coselection_lift, load, modularity
from symphony_hf.errors import GraphError

from .figure import COLORS, evenly_spaced, grid, plain_label, save_png, shown_layers, shown_names

MIN_LIFT = 1.25
"""Minimum lift of a pair that is drawn."""


def strongest_edges(adjacency_EE: Tensor) -> list[tuple[int, int, float]]:
    """Return the 2 E pairs (j, k, lift) with the highest co-selection above what their loads explain.

    They are ranked by the excess over the expectation, because the lift of two rare experts is mostly chance.
    """
    lift_EE = coselection_lift(adjacency_EE)
    adjacency_EE = adjacency_EE.detach().double().cpu()
    excess_EE = torch.where(lift_EE > 1, adjacency_EE * (1 - 1 / lift_EE), 0.0)
    j, k = torch.triu_indices(len(lift_EE), len(lift_EE), offset=1)
    kept = excess_EE[j, k].argsort(descending=True)[: 2 * len(lift_EE)]
    pairs = zip(j[kept].tolist(), k[kept].tolist(), lift_EE[j, k][kept].tolist(), strict=True)
    return [(j, k, lift) for j, k, lift in pairs if lift > MIN_LIFT]


def _scale_end(edges: Iterable[Sequence[tuple[int, int, float]]]) -> float:
    """Return the lift of the widest edges of a figure: at least 2, so that a graph with faint preferences looks faint.

    It is a quantile, because one pair of experts that are hardly used but together would leave all others hairlines.
    """
    lifts = [lift for layer in edges for _, _, lift in layer]
    return max(2.0, float(np.quantile(lifts or [2.0], 0.9)))


def edge_style(lift: float, top: float, scale: float = 1.0) -> dict[str, Any]:
    """Return the colour, width and opacity of an edge, the same for all lifts from `top` on."""
    strength = (min(lift, top) - 1) / (top - 1)
    return {"color": COLORS[0], "linewidth": scale * (0.4 + 3.6 * strength), "alpha": 0.25 + 0.75 * strength}


def _edge_handles(top: float, shares: Sequence[float]) -> list[Line2D]:
    """Return entries of the legend for edges at shares of the scale, the last of which is its end."""
    lifts = [1 + share * (top - 1) for share in shares]
    labels = [f"{lift:.1f} x expected" for lift in lifts]
    labels[-1] += " or more"
    return [Line2D([], [], label=label, **edge_style(lift, top)) for label, lift in zip(labels, lifts, strict=True)]


def _draw_network(axes: Axes, adjacency_EE: Tensor, edges: list[tuple[int, int, float]], top: float) -> None:
    num_experts = len(adjacency_EE)
    angle_E = np.empty(num_experts)
    # Clockwise from the top, in the order of the clustering.
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
    """Draw one circle of experts per layer, with edges where experts are selected together more than loads explain.

    A node's area is the expert's load; an edge's width and opacity its lift (`coselection_lift`), on one scale for all
    layers, which ends at the 90th percentile. At most 2 E edges are drawn per layer, so a missing edge is no sign of
    avoidance. Of more than 16 layers, 16 evenly spaced ones are drawn.

    Raises:
        GraphError: If there are no graphs, or one is not a co-selection graph.
    """
    shown, left_out = shown_layers(graphs)
    edges = [strongest_edges(adjacency_EE) for adjacency_EE in shown.values()]
    top = _scale_end(edges)
    rows, columns = grid(len(shown))
    side = np.interp(max(map(len, shown.values())), [16, 64], [2.6, 3.8])
    figure = Figure(figsize=(max(5.6, side * columns), (side + 0.3) * rows + 0.8), layout="constrained")
    figure.suptitle(f"Experts selected together beyond their loads{left_out}", fontsize=11)
    for number, (title, adjacency_EE) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(title, fontsize=9)
        _draw_network(axes, adjacency_EE, edges[number], top)
    handles = _edge_handles(top, (0.2, 0.5, 1.0))
    handles.append(Line2D([], [], marker="o", linestyle="", color=COLORS[1], label="area: load"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save_png(figure, path)


_MOST_LAYERS, _MOST_MOMENTS = 4, 5
_SEED = 0
"""Seed of the layout."""


def plot_graph_evolution(
    graphs: Sequence[Mapping[str, Tensor]], moments: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Draw each layer's network of experts at several moments, with one row and one layout per layer.

    Positions and the colours of communities are those of the last graph, which shows how early its communities formed.
    A node's area is the expert's load, an edge's width and opacity its lift. The modularity is below each network. Of
    more than 4 layers or 5 moments, evenly spaced ones are drawn, including the last.

    Raises:
        GraphError: If there are no graphs, one is not a co-selection graph, or the layers differ.
    """
    layers = graphs[0].keys() if graphs else ()
    if not layers or len(graphs) != len(moments) or any(one.keys() != layers for one in graphs):
        raise GraphError("an evolution needs the graphs of at least one moment, and the same layers at each")
    positions = evenly_spaced(len(graphs), _MOST_MOMENTS)
    titles, left_out = shown_names(list(graphs[0]), most=_MOST_LAYERS)
    edges = {(t, n): strongest_edges(graphs[t][n]) for t in positions for n in titles.values()}
    top = _scale_end(edges.values())
    figure = Figure(figsize=(2.15 * len(positions) + 0.5, 2.25 * len(titles) + 0.9), layout="constrained")
    figure.suptitle(f"Experts selected together, over time{left_out}", fontsize=11)
    axes = figure.subplots(len(titles), len(positions), squeeze=False)
    for row, (title, name) in enumerate(titles.items()):
        last = graphs[-1][name]
        layout, colors = _layout(last), _colors(last)
        for column, position in enumerate(positions):
            panel, graph = axes[row, column], graphs[position][name]
            _draw(panel, graph, edges[position, name], top, layout, colors)
            panel.set_xlabel(f"modularity {modularity(graph):.2f}", fontsize=7, labelpad=1)
            if row == 0:
                panel.set_title(plain_label(moments[position], 20), fontsize=9)
        axes[row, 0].set_ylabel(title, fontsize=9)
    handles = _edge_handles(top, (0.3, 1.0))
    note = "area: load; colour: community at the end"
    handles.append(Line2D([], [], label=note, marker="o", linestyle="", color="0.5"))
    columns = 3 if len(graphs) > 2 else 1  # entries side by side are wider than two networks
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return save_png(figure, path)


def _layout(adjacency_EE: Tensor) -> np.ndarray:
    """Compute a spring layout of the drawn edges within the unit square. Shape: (num_experts, 2)."""
    network = nx.Graph()
    network.add_nodes_from(range(len(adjacency_EE)))
    # Without weights, which would pull a close community into one dot.
    network.add_edges_from((j, k) for j, k, _ in strongest_edges(adjacency_EE))
    found = nx.spring_layout(network, k=3.0 / np.sqrt(len(adjacency_EE)), iterations=300, seed=_SEED)
    positions = np.array([found[expert] for expert in range(len(adjacency_EE))])
    least, most = positions.min(0), positions.max(0)
    return (positions - least) / np.maximum(most - least, 1e-9)


def _colors(adjacency_EE: Tensor) -> list[str]:
    """Return a colour for each expert: one per community for the six largest, grey for the others."""
    colors = ["0.55"] * len(adjacency_EE)
    for number, group in enumerate(communities(adjacency_EE)[: len(COLORS)]):
        for expert in group:
            colors[expert] = COLORS[number]
    return colors


def _draw(
    axes: Axes,
    adjacency_EE: Tensor,
    edges: list[tuple[int, int, float]],
    top: float,
    layout: np.ndarray,
    colors: list[str],
) -> None:
    num_experts = len(adjacency_EE)
    for j, k, lift in edges:
        axes.plot(*layout[[j, k]].T, **edge_style(lift, top, scale=min(1.0, 3 / np.sqrt(num_experts))))
    area = 900 * load(adjacency_EE).numpy()
    axes.scatter(layout[:, 0], layout[:, 1], s=area, c=colors, edgecolors="white", linewidths=0.4, zorder=3)
    if num_experts <= 32:
        for expert, (x, y) in enumerate(layout):
            above = (0, np.sqrt(area[expert]) / 2 + 1)  # the radius of its circle, in points
            axes.annotate(str(expert), (x, y), above, textcoords="offset points", ha="center", fontsize=6, zorder=4)
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.16), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("0.85")
