"""Diagnostics: what the graph of experts looks like, in numbers. In pictures: `symphony_hf.diagnostics.plots`."""

from .graph_metrics import cluster_order, coselection_lift, load, load_entropy, off_diagonal_mass, spectral_gap
from .summary import graph_summary

__all__ = [
    "cluster_order",
    "coselection_lift",
    "graph_summary",
    "load",
    "load_entropy",
    "off_diagonal_mass",
    "spectral_gap",
]
