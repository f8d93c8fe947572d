"""Figures as PNG files, and SVGs for pages, readable in print and by the colour-blind.

Nothing else in the package imports matplotlib.
"""

from .heat_maps import plot_graphs
from .networks import plot_expert_network
from .pages import draw_attack, draw_levels, draw_losses
from .planted import plot_convergence, plot_shares
from .points import plot_points
from .runs import plot_comparison, plot_curves

__all__ = [
    "draw_attack",
    "draw_levels",
    "draw_losses",
    "plot_comparison",
    "plot_convergence",
    "plot_curves",
    "plot_expert_network",
    "plot_graphs",
    "plot_points",
    "plot_shares",
]
