"""Figures as PNG files, and SVGs for pages, readable in print and by the colour-blind.

Nothing else in the package imports matplotlib.
"""

from .changes import plot_flips, plot_saturation
from .evolution import plot_graph_evolution
from .heat_maps import plot_graphs
from .loads import plot_allocation, plot_load_history
from .networks import plot_expert_network
from .pages import draw_attack, draw_levels, draw_losses
from .planted import plot_convergence, plot_shares
from .points import plot_points
from .robustness import plot_robustness
from .runs import plot_comparison, plot_curves
from .similarities import plot_similarity

__all__ = [
    "draw_attack",
    "draw_levels",
    "draw_losses",
    "plot_allocation",
    "plot_comparison",
    "plot_convergence",
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
