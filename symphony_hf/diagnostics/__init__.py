"""Diagnostics: routing, experts and their graph in numbers. In pictures: `symphony_hf.diagnostics.plots`."""

from .graph_metrics import (
    centrality,
    cluster_order,
    communities,
    coselection_lift,
    drift,
    load,
    load_entropy,
    modularity,
    off_diagonal_mass,
    spectral_gap,
)
from .routing_metrics import (
    cka_matrix,
    coactivation,
    dead_experts,
    domain_allocation,
    domain_information,
    flip_rate,
    load_of_choices,
    normalized_entropy,
    router_margin,
    router_saturation,
)
from .summary import graph_summary

__all__ = [
    "centrality",
    "cka_matrix",
    "cluster_order",
    "coactivation",
    "communities",
    "coselection_lift",
    "dead_experts",
    "domain_allocation",
    "domain_information",
    "drift",
    "flip_rate",
    "graph_summary",
    "load",
    "load_entropy",
    "load_of_choices",
    "modularity",
    "normalized_entropy",
    "off_diagonal_mass",
    "router_margin",
    "router_saturation",
    "spectral_gap",
]
