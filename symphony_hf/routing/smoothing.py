"""The graph applied: on a router's logits, through its weight, or on its probabilities."""

import torch
from torch import Tensor

from .graph import without_autocast


def _check_experts(what: str, num_experts: int, transition_EE: Tensor) -> None:
    if transition_EE.shape != (num_experts, num_experts):
        raise ValueError(f"{what} has {num_experts} experts, the transition matrix {tuple(transition_EE.shape)}")


def _change(transition_EE: Tensor) -> Tensor:
    """A - I. `x + (A - I) x` is exactly x where A = I, also where products are of TF32 or bfloat16, as `A x` is not."""
    return transition_EE.float() - torch.eye(transition_EE.shape[-1], device=transition_EE.device)


def smooth_logits(logits_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Replace each expert's logit by the graph-weighted sum over its neighbours.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        transition_EE: The matrix A. Shape: (num_experts, num_experts).

    Returns:
        Smoothed logits g @ A.T, float32 (float64 for float64 logits): A = I gives g itself. Shape: (tokens,
        num_experts).

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, the Symphony gate g_sym_j = sum_k a_jk g_k. Deviation: none.
    """
    _check_experts("the logits", logits_TE.shape[-1], transition_EE)
    with without_autocast(logits_TE):
        logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        return torch.addmm(logits, logits, _change(transition_EE).to(logits.dtype).T)


def smooth_weight(weight_ED: Tensor, transition_EE: Tensor) -> Tensor:
    """The router weight whose plain logits are the smoothed ones: x (A W).T = (x W.T) A.T.

    Used in place of `smooth_logits` at run time: every family's own forward then does the rest, and a folded
    checkpoint holds these very numbers, so that folding changes no bit.

    Args:
        weight_ED: Router weight. Shape: (num_experts, hidden_size); a bias of shape (num_experts,) works too.
        transition_EE: The matrix A. Shape: (num_experts, num_experts).

    Returns:
        A @ W, computed in float32 (float64 for a float64 weight) and rounded once to the weight's type. A = I gives W
        itself, in every precision that `torch.set_float32_matmul_precision` gives to products (a zero may lose its
        sign). Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, rewritten by linearity. Deviation: none in exact arithmetic.
    """
    _check_experts("the router's weight", weight_ED.shape[0], transition_EE)
    with without_autocast(weight_ED):
        dtype = torch.promote_types(weight_ED.dtype, torch.float32)
        weight, change_EE = weight_ED.to(dtype), _change(transition_EE).to(dtype)
        product = torch.addmm if weight.dim() == 2 else torch.addmv
        return product(weight, change_EE, weight).to(weight_ED.dtype)


def smooth_probabilities(probabilities_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Mix probabilities over the graph: p(z_j) = sum_k p(z_k) p(j | k), with p(j | k) = A_kj.

    Args:
        probabilities_TE: One distribution over the experts a token. Shape: (tokens, num_experts).
        transition_EE: Row-stochastic A. Shape: (num_experts, num_experts).

    Returns:
        p @ A, float32: still one distribution a token, since A's rows sum to 1. Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, the probabilistic reading of the gate.
    """
    _check_experts("the probabilities", probabilities_TE.shape[-1], transition_EE)
    with without_autocast(probabilities_TE):
        probabilities = probabilities_TE.float()
        return torch.addmm(probabilities, probabilities, _change(transition_EE))


def smooth_scores(logits_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Logits whose softmax is the graph-mixed softmax of the given ones, so that any softmax head can finish.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        transition_EE: Row-stochastic A. Shape: (num_experts, num_experts).

    Returns:
        g + log(softmax(g) @ A) - log(softmax(g)), in the logits' type: A = I changes no bit. Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: arXiv 2510.16411, the probabilistic reading. Deviation: logits that keep the given
    ones' log-partition, which softmax ignores and the z-loss needs.
    """
    logits = logits_TE.float()
    before_TE = logits.softmax(-1)
    after_TE = smooth_probabilities(before_TE, transition_EE)
    tiny = torch.finfo(torch.float32).tiny
    # The clamps keep log's gradient finite where a probability underflowed.
    log_before_TE, log_after_TE = before_TE.clamp_min(tiny).log(), after_TE.clamp_min(tiny).log()
    mixed_TE = logits - (log_before_TE - log_after_TE)
    # From an underflown probability the difference cannot be told; what came to it from its neighbours can.
    revived_TE = torch.where(after_TE > tiny, log_after_TE + logits.logsumexp(-1, keepdim=True), logits)
    return torch.where(before_TE > tiny, mixed_TE, revived_TE).to(logits_TE.dtype)


def smooth_sigmoid_scores(logits_TE: Tensor, transition_EE: Tensor) -> Tensor:
    """Logits whose sigmoid is the graph's mean of the given ones' sigmoids, so that any sigmoid head can finish.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        transition_EE: Row-stochastic A. Shape: (num_experts, num_experts).

    Returns:
        logit(sigmoid(g) @ A.T), in the logits' type, and g itself, to the bit, where A = I. Same shape.

    Raises:
        ValueError: If the numbers of experts differ.

    Source: ours; the paper's routers have a softmax. Sigmoid scores are E probabilities, not one distribution, so
    each is averaged over its expert's neighbours, A's row, which keeps it between 0 and 1.
    """
    _check_experts("the logits", logits_TE.shape[-1], transition_EE)
    logits = logits_TE.float()
    # 1 - p of a sigmoid near 1 has lost its digits: the complement is carried beside it, of which A, whose rows sum to
    # 1, takes the mean as well.
    before = logits.sigmoid(), (-logits).sigmoid()
    with without_autocast(logits_TE):
        change_EE = _change(transition_EE).T
        after = tuple(torch.addmm(p_TE, p_TE, change_EE) for p_TE in before)
    is_kept_TE = (after[0] == before[0]) & (after[1] == before[1])
    after_TE = _log_odds(*after)
    # The difference is 0 there; its gradient is not.
    kept_TE = logits - (_log_odds(*before) - after_TE)
    return torch.where(is_kept_TE, kept_TE, after_TE).to(logits_TE.dtype)


def _log_odds(p_TE: Tensor, complement_TE: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny  # keeps log's gradient finite where a sigmoid underflowed
    return p_TE.clamp_min(tiny).log() - complement_TE.clamp_min(tiny).log()


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
