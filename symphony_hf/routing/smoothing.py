"""Smoothing over the graph: of logits, of the router's weight, or of scores."""

import torch
from torch import Tensor

from .graph import without_autocast


def _check_experts(name: str, num_experts: int, transition_EE: Tensor) -> None:
    if transition_EE.shape != (num_experts, num_experts):
        raise ValueError(f"{name}: got {num_experts} experts, but a transition matrix of {tuple(transition_EE.shape)}")


def _minus_identity(transition_EE: Tensor) -> Tensor:
    """Return A - I. If A = I, `x + (A - I) x` is exactly x even with TF32 or bfloat16 products; `A x` is not."""
    return transition_EE.float() - torch.eye(transition_EE.shape[-1], device=transition_EE.device)


def smooth_logits(logits_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Replace each expert's logit by the graph-weighted sum over its neighbours.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        transition_EE: Routing matrix A. Shape: (num_experts, num_experts).

    Returns:
        Smoothed logits g @ A.T, float32 (float64 for float64 logits); exactly g if A = I. Shape: (tokens, num_experts).

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, the Symphony gate g_sym_j = sum_k a_jk g_k. Deviation: none.
    """
    _check_experts("the logits", logits_TE.shape[-1], transition_EE)
    return add_residual(logits_TE, _minus_identity(transition_EE))


def add_residual(logits_TE: Tensor, residual_EE: Tensor) -> Tensor:
    """Smooth logits by A - I, from `routing_residual`: `smooth_logits` for a caller that does not need A itself."""
    with without_autocast(logits_TE):
        if logits_TE.dtype != residual_EE.dtype:
            dtype = torch.promote_types(logits_TE.dtype, torch.float32)
            logits_TE, residual_EE = logits_TE.to(dtype), residual_EE.to(dtype)
        return torch.addmm(logits_TE, logits_TE, residual_EE.T)


def smooth_weight(weight_ED: Tensor, transition_EE: Tensor) -> Tensor:
    """Return the router weight that produces smoothed logits: x (A W).T = (x W.T) A.T.

    A folded checkpoint stores these numbers. In 16 bits a router multiplies by them at run time too, since their
    rounding decides close choices; in float32 `smooth_logits` is cheaper, and equal up to rounding.

    Args:
        weight_ED: Router weight, or a bias of shape (num_experts,). Shape: (num_experts, hidden_size).
        transition_EE: Routing matrix A. Shape: (num_experts, num_experts).

    Returns:
        A @ W, computed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype; exactly W if
        A = I, whatever `torch.set_float32_matmul_precision` is (up to the sign of zeros). Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, rewritten by linearity. Deviation: none in exact arithmetic.
    """
    _check_experts("the router's weight", weight_ED.shape[0], transition_EE)
    return add_residual_to_weight(weight_ED, _minus_identity(transition_EE))


def add_residual_to_weight(weight_ED: Tensor, residual_EE: Tensor) -> Tensor:
    """Smooth a weight by A - I, from `routing_residual`: `smooth_weight` for a caller that does not need A itself."""
    with without_autocast(weight_ED):
        dtype = torch.promote_types(weight_ED.dtype, torch.float32)
        weight = weight_ED.to(dtype)
        product = torch.addmm if weight.dim() == 2 else torch.addmv
        return product(weight, residual_EE.to(dtype), weight).to(weight_ED.dtype)


def smooth_probabilities(probabilities_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Mix probabilities over the graph: p(z_j) = sum_k p(z_k) p(j | k), with p(j | k) = A_kj.

    Args:
        probabilities_TE: One distribution over experts per token. Shape: (tokens, num_experts).
        transition_EE: Row-stochastic routing matrix A. Shape: (num_experts, num_experts).

    Returns:
        p @ A, float32; still one distribution per token, since A's rows sum to 1. Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, the probabilistic reading of the gate.
    """
    _check_experts("the probabilities", probabilities_TE.shape[-1], transition_EE)
    with without_autocast(probabilities_TE):
        probabilities = probabilities_TE.float()
        return torch.addmm(probabilities, probabilities, _minus_identity(transition_EE))


def smooth_scores(logits_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Return logits whose softmax is the graph-mixed softmax of the given logits.

    A router with a softmax scoring function can continue from them unchanged.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        transition_EE: Row-stochastic routing matrix A. Shape: (num_experts, num_experts).

    Returns:
        g + log(softmax(g) @ A) - log(softmax(g)), in the logits' dtype; exactly g if A = I. Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, the probabilistic reading of the gate. Deviation: the log-partition is kept, which softmax
    ignores and the z-loss needs.
    """
    logits = logits_TE.float()
    before_TE = logits.softmax(-1)
    after_TE = smooth_probabilities(before_TE, transition_EE)
    tiny = torch.finfo(torch.float32).tiny
    # The clamps keep log's gradient finite where a probability underflowed.
    log_before_TE, log_after_TE = before_TE.clamp_min(tiny).log(), after_TE.clamp_min(tiny).log()
    mixed_TE = logits - (log_before_TE - log_after_TE)
    # Where a probability underflowed the difference is lost, so use what its neighbours contributed.
    revived_TE = torch.where(after_TE > tiny, log_after_TE + logits.logsumexp(-1, keepdim=True), logits)
    return torch.where(before_TE > tiny, mixed_TE, revived_TE).to(logits_TE.dtype)


def smooth_sigmoid_scores(logits_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Return logits whose sigmoid is the graph-weighted mean of the given logits' sigmoids.

    A router with a sigmoid scoring function can continue from them unchanged.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        transition_EE: Row-stochastic routing matrix A. Shape: (num_experts, num_experts).

    Returns:
        logit(sigmoid(g) @ A.T), in the logits' dtype; exactly g if A = I. Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: ours; the paper's routers use softmax. Sigmoid scores are E separate probabilities, not one distribution, so
    each is averaged over its expert's neighbours (a row of A), which keeps it between 0 and 1.
    """
    _check_experts("the logits", logits_TE.shape[-1], transition_EE)
    logits = logits_TE.float()
    # 1 - p loses its digits near p = 1, so the complement is averaged separately; A's rows sum to 1, which allows it.
    before = logits.sigmoid(), (-logits).sigmoid()
    with without_autocast(logits_TE):
        change_EE = _minus_identity(transition_EE).T
        after = tuple(torch.addmm(p_TE, p_TE, change_EE) for p_TE in before)
    is_kept_TE = (after[0] == before[0]) & (after[1] == before[1])
    after_TE = _log_odds(*after)
    # This difference is 0, but its gradient is not.
    kept_TE = logits - (_log_odds(*before) - after_TE)
    return torch.where(is_kept_TE, kept_TE, after_TE).to(logits_TE.dtype)


def _log_odds(p_TE: Tensor, complement_TE: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny  # keeps log's gradient finite where a sigmoid underflowed
    return p_TE.clamp_min(tiny).log() - complement_TE.clamp_min(tiny).log()


def fold_linear(weight_ED: Tensor, bias_E: Tensor | None, transition_EE: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of the plain router with the same smoothed logits: A (W x + b) = (A W) x + A b.

    Args:
        weight_ED: Router weight. Shape: (num_experts, hidden_size).
        bias_E: Router bias, or None. Shape: (num_experts,).
        transition_EE: Routing matrix A. Shape: (num_experts, num_experts).

    Returns:
        The folded weight and bias, in their own dtypes and shapes: in 16 bits the numbers that a Symphony router uses
        at run time, in float32 those of its logits up to rounding.

    Raises:
        ValueError: If the numbers of experts differ.
    """
    return smooth_weight(weight_ED, transition_EE), None if bias_E is None else smooth_weight(bias_E, transition_EE)
