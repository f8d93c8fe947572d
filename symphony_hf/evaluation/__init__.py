"""Evaluation: perplexity by document, accuracy, routing under attack, and confidence intervals of comparisons."""

from symphony_hf.diagnostics.routing_metrics import flip_rate
from symphony_hf.evaluation.routing.records import RoutingRecord, RoutingStability, record_routing, routing_stability

from .comparison import compare_attacked, compare_perplexity, compare_robustness, perplexity_interval
from .generation import AnswerScores, answer_freely, choose_answers
from .metrics import METRICS, Choices, Metric, compare_changes, compare_choices, metric_interval, pooled_choices
from .multiple_choice import ChoiceScores, accuracy_interval, compare_accuracy, score_choices
from .perplexity import DocumentScores, score_documents, score_stream, score_tokens
from .statistics import MIN_DOCUMENTS, Interval, SeedInterval, paired_bootstrap, paired_ratio, t_interval
from .windows import aligned_positions

__all__ = [
    "METRICS",
    "MIN_DOCUMENTS",
    "AnswerScores",
    "ChoiceScores",
    "Choices",
    "DocumentScores",
    "Interval",
    "Metric",
    "RoutingRecord",
    "RoutingStability",
    "SeedInterval",
    "accuracy_interval",
    "aligned_positions",
    "answer_freely",
    "choose_answers",
    "compare_accuracy",
    "compare_attacked",
    "compare_changes",
    "compare_choices",
    "compare_perplexity",
    "compare_robustness",
    "flip_rate",
    "metric_interval",
    "paired_bootstrap",
    "paired_ratio",
    "perplexity_interval",
    "pooled_choices",
    "record_routing",
    "routing_stability",
    "score_choices",
    "score_documents",
    "score_stream",
    "score_tokens",
    "t_interval",
]
