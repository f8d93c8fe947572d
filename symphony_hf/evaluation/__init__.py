"""Evaluation: perplexity by document, routing under attack, and intervals for what is compared."""

from .alignment import aligned_positions
from .comparison import compare_perplexity, compare_robustness, perplexity_interval
from .perplexity import DocumentScores, score_documents
from .routing import RoutingKept, choices_kept, record_routing, routing_kept
from .statistics import MIN_DOCUMENTS, Interval, paired_bootstrap

__all__ = [
    "MIN_DOCUMENTS",
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
