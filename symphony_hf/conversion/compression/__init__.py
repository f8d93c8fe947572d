"""Compression to fewer experts, or fewer per token, with its cost in perplexity on held-out text."""

from .merge import merge_experts
from .prune import prune_experts
from .settings import GRAPHS, MERGE_BY, PRUNE_BY, MergeSettings, PruneSettings, TopKSettings
from .shrink import compare_results
from .tables import compression_table, findings, print_compression, print_sweep, sweep_table
from .top_k import sweep_top_k

__all__ = [
    "GRAPHS",
    "MERGE_BY",
    "PRUNE_BY",
    "MergeSettings",
    "PruneSettings",
    "TopKSettings",
    "compare_results",
    "compression_table",
    "findings",
    "merge_experts",
    "print_compression",
    "print_sweep",
    "prune_experts",
    "sweep_table",
    "sweep_top_k",
]
