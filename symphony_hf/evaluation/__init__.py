"""Evaluation: perplexity by document, accuracy of answers, routing under attack, and intervals for what is compared."""

from .alignment import aligned_positions
from .classification import ChoiceScores, accuracy_interval, compare_accuracy, score_choices
from .comparison import compare_attacked, compare_perplexity, compare_robustness, perplexity_interval
from .perplexity import DocumentScores, score_documents, score_tokens
from .routing import RoutingKept, RoutingRecord, choices_kept, record_routing, routing_kept
from .statistics import MIN_DOCUMENTS, Interval, paired_bootstrap
from .vqa import AnswerScores, score_answers

__all__ = [
    "MIN_DOCUMENTS",
    "AnswerScores",
    "ChoiceScores",
    "DocumentScores",
    "Interval",
    "RoutingKept",
    "RoutingRecord",
    "accuracy_interval",
    "aligned_positions",
    "choices_kept",
    "compare_accuracy",
    "compare_attacked",
    "compare_perplexity",
    "compare_robustness",
    "paired_bootstrap",
    "perplexity_interval",
    "record_routing",
    "routing_kept",
    "score_answers",
    "score_choices",
    "score_documents",
    "score_tokens",
]
