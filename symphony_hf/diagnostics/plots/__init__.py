"""Figures as PNG files, and SVGs for HTML pages, readable in print and by the colour-blind.

Functions named `plot_...` write a PNG file and return its path; those named `draw_...` return an SVG. Graphs are given
by layer name, each an adjacency of shape (num_experts, num_experts). No other module of the package imports matplotlib.
"""

from .attacks import plot_flips, plot_robustness, plot_saturation
from .copies import plot_copies
from .curves import draw_attack, draw_levels, draw_losses, plot_comparison, plot_curves
from .heat_maps import plot_graphs, plot_similarity
from .loads import plot_allocation, plot_load_history
from .networks import plot_expert_network, plot_graph_evolution
from .studies import plot_convergence, plot_points, plot_shares

__all__ = [
    "draw_attack",
    "draw_levels",
    "draw_losses",
    "plot_allocation",
    "plot_comparison",
    "plot_convergence",
    "plot_copies",
    "plot_curves",
    "plot_expert_network",
    "plot_flips",
    "plot_graph_evolution",
    "plot_graphs",
    "plot_load_history",
    "plot_points",
    "plot_robustness",
    "plot_saturation",
    "plot_shares",
    "plot_similarity",
]
