"""Evaluation: perplexity by document, routing under attack, and intervals for what is compared."""

from .alignment import aligned_positions
from .perplexity import DocumentScores, score_documents
from .routing import RoutingKept, choices_kept, record_routing, routing_kept
from .statistics import Interval, compare_perplexity, compare_robustness, paired_bootstrap, perplexity_interval

__all__ = [
    "DocumentScores",
    "Interval",
    "RoutingKept",
    "aligned_positions",
    "choices_kept",
    "compare_perplexity",
    "compare_robustness",
    "paired_bootstrap",
    "perplexity_interval",
    "record_routing",
    "routing_kept",
    "score_documents",
]
