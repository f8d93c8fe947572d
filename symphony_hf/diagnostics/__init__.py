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
    choices_kept,
    cka_matrix,
    coactivation,
    dead_experts,
    domain_allocation,
    domain_information,
    kept_by_token,
    load_of_choices,
    normalized_entropy,
    router_margin,
    router_saturation,
)
from .summary import graph_summary

__all__ = [
    "centrality",
    "choices_kept",
    "cka_matrix",
    "cluster_order",
    "coactivation",
    "communities",
    "coselection_lift",
    "dead_experts",
    "domain_allocation",
    "domain_information",
    "drift",
    "graph_summary",
    "kept_by_token",
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
