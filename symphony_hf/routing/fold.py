"""The graph folded into a plain linear router, after which nothing of it is left to compute."""

from torch import Tensor

from .smoothing import smooth_weight


def fold_linear(weight_ED: Tensor, bias_E: Tensor | None, transition_EE: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the plain router that gives the smoothed logits: A (W x + b) = (A W) x + A b.

    Args:
        weight_ED: Router weight. Shape: (num_experts, hidden_size).
        bias_E: Its bias in the logits, if it has one. Shape: (num_experts,).
        transition_EE: The matrix A. Shape: (num_experts, num_experts).

    Returns:
        The folded weight and bias, in their own types and shapes. The same numbers as a Symphony router uses at
        run time, so nothing is lost by folding.

    Raises:
        ValueError: If the numbers of experts differ.
    """
    return smooth_weight(weight_ED, transition_EE), None if bias_E is None else smooth_weight(bias_E, transition_EE)
