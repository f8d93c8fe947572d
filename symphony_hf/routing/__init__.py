"""Symphony routing as pure functions on tensors, which use torch alone: no model and no state.

Shape suffixes, used for routing tensors throughout the package:

    T  tokens in one forward       E  experts
    K  experts chosen per token    D  hidden size

    logits_TE, indices_TK, weight_ED, adjacency_EE ...

Pipeline: `count_coselections` -> `update_adjacency` -> `transition_matrix` ->
`mix_with_identity` -> `smooth_weight` (on logits) or `smooth_scores` (on probabilities).
"""

from .gradient import mixture_weights
from .graph import (
    adjacency_problems,
    count_coselections,
    initial_adjacency,
    mix_with_identity,
    transition_matrix,
    update_adjacency,
    without_autocast,
)
from .losses import AttachLoss, RecordGradientScale, load_balancing_loss, z_loss
from .smoothing import (
    fold_linear,
    smooth_logits,
    smooth_probabilities,
    smooth_scores,
    smooth_sigmoid_scores,
    smooth_weight,
)

__all__ = [
    "AttachLoss",
    "RecordGradientScale",
    "adjacency_problems",
    "count_coselections",
    "fold_linear",
    "initial_adjacency",
    "load_balancing_loss",
    "mix_with_identity",
    "mixture_weights",
    "smooth_logits",
    "smooth_probabilities",
    "smooth_scores",
    "smooth_sigmoid_scores",
    "smooth_weight",
    "transition_matrix",
    "update_adjacency",
    "without_autocast",
    "z_loss",
]
