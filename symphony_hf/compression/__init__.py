"""Fewer experts, or fewer of them a token: a smaller stock checkpoint, and what that costs on held-out text."""

from .merging import merge_experts
from .pruning import prune_experts
from .settings import GRAPHS, MERGE_BY, PRUNE_BY, MergeSettings, PruneSettings, TopKSettings
from .sweeping import sweep_top_k
from .tables import compression_table, print_compression, print_sweep, sweep_table

__all__ = [
    "GRAPHS",
    "MERGE_BY",
    "PRUNE_BY",
    "MergeSettings",
    "PruneSettings",
    "TopKSettings",
    "compression_table",
    "merge_experts",
    "print_compression",
    "print_sweep",
    "prune_experts",
    "sweep_table",
    "sweep_top_k",
]
