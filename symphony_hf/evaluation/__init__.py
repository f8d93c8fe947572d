"""Evaluation: perplexity by document, accuracy of answers, routing under attack, and intervals for what is compared."""

from .alignment import aligned_positions
from .classification import ChoiceScores, accuracy_interval, compare_accuracy, score_choices
from .comparison import compare_attacked, compare_perplexity, compare_robustness, perplexity_interval
from .metrics import METRICS, Choices, Metric, compare_changes, compare_choices, metric_interval, pooled_choices
from .perplexity import DocumentScores, score_documents, score_stream, score_tokens
from .processed import answer_freely, choose_answers
from .routing import RoutingKept, RoutingRecord, choices_kept, record_routing, routing_kept
from .seeds import SeedInterval, paired_ratio, t_interval
from .statistics import MIN_DOCUMENTS, Interval, paired_bootstrap
from .vqa import AnswerScores

__all__ = [
    "METRICS",
    "MIN_DOCUMENTS",
    "AnswerScores",
    "ChoiceScores",
    "Choices",
    "DocumentScores",
    "Interval",
    "Metric",
    "RoutingKept",
    "RoutingRecord",
    "SeedInterval",
    "accuracy_interval",
    "aligned_positions",
    "answer_freely",
    "choices_kept",
    "choose_answers",
    "compare_accuracy",
    "compare_attacked",
    "compare_changes",
    "compare_choices",
    "compare_perplexity",
    "compare_robustness",
    "metric_interval",
    "paired_bootstrap",
    "paired_ratio",
    "perplexity_interval",
    "pooled_choices",
    "record_routing",
    "routing_kept",
    "score_choices",
    "score_documents",
    "score_stream",
    "score_tokens",
    "t_interval",
]
