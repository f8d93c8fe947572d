"""The co-selection graph: counts, their moving average (the adjacency), and the transition matrix.

The paper calls it the "social graph" of experts.
"""

import contextlib
from typing import get_args

import torch
from torch import Tensor

from symphony_hf.config import Normalization

_NO_CONTEXT = contextlib.nullcontext()
_LARGEST_SUBNORMAL = torch.finfo(torch.float32).tiny - 2.0**-149


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Disable autocast on the tensor's device: bfloat16 would round the graph, and counts above 256."""
    # The meta device is none that autocast knows; and entering its context costs more than to ask whether it is on.
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return _NO_CONTEXT
    return torch.autocast(tensor.device.type, enabled=False)  # type: ignore[return-value]


def initial_adjacency(num_experts: int, top_k: int, device: torch.device | str | None = None) -> Tensor:
    """Return the graph before any token is seen: even load, and no edges between experts.

    Its transition matrix is exactly the identity under every normalization (x / x is 1), so a new
    Symphony router matches the base router bit for bit, and the graph takes effect over about
    1 / (1 - decay) updates. Starting from zero would cause a jump at the first update, because
    normalization cancels the moving average's scale.

    Args:
        num_experts: Number of experts, E.
        top_k: Experts chosen per token, K.
        device: Device of the result.

    Returns:
        (K / E) times the identity, float32. Shape: (num_experts, num_experts).

    Source: ours; arXiv 2510.16411 does not publish its initial graph.
    """
    # Cast explicitly: DeepSpeed's zero.Init makes tensor constructors return its own dtype.
    return torch.eye(num_experts, device=device).to(torch.float32) * (top_k / num_experts)


def symmetrize(adjacency_EE: Tensor) -> Tensor:
    """Make a learned adjacency symmetric and non-negative: half of A + A^T, negative entries set to 0.

    Bit for bit the adjacency where it is symmetric and non-negative. Shape: (num_experts, num_experts).
    """
    return 0.5 * (adjacency_EE + adjacency_EE.T).clamp(min=0.0)


def count_coselections(indices_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Count how often each pair of experts is chosen together by the tokens of one forward.

    Args:
        indices_TK: Chosen experts, distinct within a token. Shape: (tokens, top_k), integer.
        num_experts: Number of experts, E.
        mask_T: True (or 1) for real tokens, False for padding. Shape: (tokens,). None counts every token.

    Returns:
        C = S.T @ S, where S is the 0/1 selection matrix; the diagonal is each expert's load. Float32, exact for
        counts up to 2**24. Shape: (num_experts, num_experts).

    Source: arXiv 2510.16411.
    """
    num_tokens, top_k = indices_TK.shape
    with without_autocast(indices_TK):
        chosen = torch.ones(num_tokens, 1, device=indices_TK.device, dtype=torch.float32)
        if mask_T is not None:
            chosen = mask_T.to(device=indices_TK.device, dtype=torch.float32).unsqueeze(-1)
        selected_TE = torch.zeros(num_tokens, num_experts, device=indices_TK.device, dtype=torch.float32)
        selected_TE = selected_TE.scatter(1, indices_TK.long(), chosen.expand(-1, top_k))
        return selected_TE.T @ selected_TE


def update_adjacency(adjacency_EE: Tensor, counts_EE: Tensor, num_tokens: Tensor, decay: float) -> Tensor:
    """Take one step of the moving average: `decay * adjacency + (1 - decay) * counts / num_tokens`.

    Args:
        adjacency_EE: Current adjacency. Shape: (num_experts, num_experts), float32.
        counts_EE: Co-selection counts, summed over micro-batches and ranks. Same shape.
        num_tokens: Number of tokens counted, as a scalar tensor to avoid a device synchronization.
        decay: Decay in [0, 1]; the graph remembers about 1 / (1 - decay) updates.

    Returns:
        The updated adjacency, or the current one if no token was counted or the counts are not finite. Same shape.

    Source: arXiv 2510.16411, the graph's moving average. Deviation: the paper does not publish its decay.
    """
    updated_EE = decay * adjacency_EE + (1.0 - decay) * (counts_EE / num_tokens)
    usable = (num_tokens > 0) & torch.isfinite(counts_EE).all()
    return torch.where(usable, updated_EE, adjacency_EE)


def transition_matrix(adjacency_EE: Tensor, normalization: Normalization = "row", self_loops: bool = True) -> Tensor:
    """Normalize the adjacency into the weight that each expert gives to its neighbours' logits.

    Args:
        adjacency_EE: Symmetric, non-negative adjacency. Shape: (..., num_experts, num_experts), float32.
        normalization: `row`: D^-1 M; every row sums to 1, which preserves softmax's shift invariance.
            `conditional`: a_jk = adjacency_jk / adjacency_jj, the probability of k given j; with self
            loops and a fixed top-k every row sums to 1 in the initial graph, and to K once the moving average has
            forgotten it. `symmetric`: D^-1/2 M D^-1/2. `centred`: the identity, plus the conditional probabilities
            less those expected of independent choices (`expected_probabilities`); every row sums to 1, with positive
            and negative entries.
        self_loops: Whether to keep the diagonal of M. `centred` never uses it.

    Returns:
        The transition matrix P. A row without mass (an expert that was never chosen, or whose counts decayed below
        the smallest normal float32) is the identity's row. Shape: (..., num_experts, num_experts), float32.

    Raises:
        ValueError: If the normalization is unknown.

    Source: arXiv 2510.16411. Deviation: the paper publishes neither its normalization nor its diagonal; `centred` is
    ours.
    """
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization: got {normalization!r}, known are {', '.join(get_args(Normalization))}")
    identity_EE = torch.eye(adjacency_EE.shape[-1], device=adjacency_EE.device).to(adjacency_EE.dtype)
    mass_EE = adjacency_EE if self_loops and normalization != "centred" else adjacency_EE * (1.0 - identity_EE)
    degree_E = mass_EE.sum(-1)
    by_load = normalization in ("conditional", "centred")
    size_E = adjacency_EE.diagonal(dim1=-2, dim2=-1) if by_load else degree_E
    # Subnormal numbers have too little precision to divide by.
    tiny = torch.finfo(adjacency_EE.dtype).tiny
    alone_E = size_E < tiny if normalization == "centred" else (degree_E < tiny) | (size_E < tiny)
    # Divide by 1 instead: 0 / 0 or sqrt(0) would give NaN gradients, even in the branch that `where` discards.
    size_E = torch.where(alone_E, torch.ones_like(size_E), size_E)
    divisor_EE = size_E.unsqueeze(-1)
    if normalization == "symmetric":
        root_E = size_E.sqrt()
        # sqrt(d) * sqrt(d) equals d only up to rounding; use d on the diagonal, so that the initial P is exactly I.
        roots_EE = root_E.unsqueeze(-1) * root_E.unsqueeze(-2)
        divisor_EE = torch.where(identity_EE.bool(), divisor_EE, roots_EE)
    transition_EE = mass_EE / divisor_EE
    if normalization == "centred":
        transition_EE = identity_EE + (transition_EE - expected_probabilities(transition_EE, degree_E))
    return torch.where(alone_E.unsqueeze(-1), identity_EE, transition_EE)


def expected_probabilities(conditional_EE: Tensor, degree_E: Tensor) -> Tensor:
    """Return the probability of k given j that is expected if experts are chosen independently of one another.

    Args:
        conditional_EE: Observed probability of k given j, with a diagonal of 0. Shape: (..., num_experts, num_experts).
        degree_E: Sum of each expert's co-selections with others, m. Shape: (..., num_experts).

    Returns:
        Row j's sum of `conditional_EE`, shared out over the other experts in proportion to m_k / (sum(m) - m_k); the
        diagonal is 0. Every row sums to that of `conditional_EE`. Same shape.

    Source: ours. Independent choices give M_jk = w_j w_k off the diagonal, hence m_k = w_k (sum(w) - w_k), and
    m_k / (sum(m) - m_k) is the first step of solving that for w; `coselection_lift` in `diagnostics` solves it, which a
    forward has no time for. It is exact for even loads. For loads that differ at most fivefold among 16 experts, of
    which 2 are chosen, the largest error is 0.022, where one expert has five times the load of each other one; it is
    below 0.001 where the weights w are spread evenly.
    """
    total = degree_E.sum(-1, keepdim=True)
    tiny = torch.finfo(degree_E.dtype).tiny
    met = total >= tiny
    # Before any co-selection the shares are even, so that a learned graph has a gradient from the start.
    share_E = torch.where(met, degree_E / torch.where(met, total - degree_E, 1.0), 1.0)
    others = 1.0 - torch.eye(degree_E.shape[-1], device=degree_E.device).to(degree_E.dtype)
    share_EE = share_E.unsqueeze(-2) * others
    share_EE = share_EE / share_EE.sum(-1, keepdim=True).clamp_min(tiny)
    return conditional_EE.sum(-1, keepdim=True) * share_EE


def mix_with_identity(transition_EE: Tensor, strength: Tensor | float) -> Tensor:
    """Return the matrix used in routing, `A = (1 - strength) I + strength P`.

    Args:
        transition_EE: Transition matrix P. Shape: (..., num_experts, num_experts).
        strength: Strength in [-1, 1]; 0 gives the base router. If negative, experts that are chosen together inhibit
            each other.

    Returns:
        A, computed as I + strength (P - I), so that P = I or strength = 0 gives exactly I. Same shape.
    """
    identity_EE = torch.eye(transition_EE.shape[-1], device=transition_EE.device).to(transition_EE.dtype)
    return identity_EE + strength * (transition_EE - identity_EE)


def routing_residual(
    adjacency_EE: Tensor, strength: Tensor | float, normalization: Normalization = "row", self_loops: bool = True
) -> Tensor:
    """Return A - I for the matrix A used in routing: what a forward adds, in as few operations as it takes.

    Args:
        adjacency_EE: As for `transition_matrix`. Shape: (num_experts, num_experts), float32.
        strength: Strength, as for `mix_with_identity`.
        normalization: As for `transition_matrix`.
        self_loops: As for `transition_matrix`.

    Returns:
        strength (P - I), exactly 0 if P = I or strength = 0. Same shape.
    """
    if normalization != "row":
        transition_EE = transition_matrix(adjacency_EE, normalization, self_loops)
        identity_EE = torch.eye(len(adjacency_EE), device=adjacency_EE.device).to(adjacency_EE.dtype)
        return strength * (transition_EE - identity_EE)
    mass_EE = adjacency_EE
    if not self_loops:
        mass_EE = torch.diagonal_scatter(mass_EE, torch.zeros_like(mass_EE[0]))
    degree_E = mass_EE.sum(-1)
    # Infinity makes 0 of the row of an expert without mass, in the gradient too.
    factor_E = torch.threshold(degree_E, _LARGEST_SUBNORMAL, torch.inf).reciprocal()
    if not (isinstance(strength, float) and strength == 1.0):  # a token's forward notices each operation
        factor_E = strength * factor_E
    return torch.diagonal_scatter(mass_EE, mass_EE.diagonal() - degree_E) * factor_E.unsqueeze(-1)


def adjacency_problems(adjacency_EE: Tensor, num_experts: int) -> list[str]:
    """List the reasons why a tensor is not a valid adjacency.

    Args:
        adjacency_EE: Any tensor, possibly from an untrusted file.
        num_experts: Number of experts of the router it is meant for.

    Returns:
        One phrase per problem (shape, dtype, non-finite, negative or non-symmetric entries, entries that float32
        cannot normalize); empty for a valid adjacency.
    """
    if tuple(adjacency_EE.shape) != (num_experts, num_experts):
        return [f"shape {tuple(adjacency_EE.shape)} instead of ({num_experts}, {num_experts})"]
    if not adjacency_EE.is_floating_point():
        return [f"type {adjacency_EE.dtype} instead of float32"]
    values_EE = adjacency_EE.detach().to(torch.float32)
    num_bad = int((~torch.isfinite(values_EE)).sum())
    if num_bad:
        return [f"{num_bad} non-finite entries"]
    problems = []
    # Row sums and quotients can overflow float32 even where every entry is finite.
    size_E = values_EE.diagonal()
    size_E = torch.where(size_E < torch.finfo(torch.float32).tiny, torch.ones_like(size_E), size_E)
    if not torch.isfinite(values_EE.sum(-1)).all() or not torch.isfinite(values_EE / size_E.unsqueeze(-1)).all():
        problems.append(f"entries too large, or too far apart, to be normalized (up to {values_EE.max():.3g})")
    num_negative = int((values_EE < 0).sum())
    if num_negative:
        problems.append(f"{num_negative} negative entries")
    # Counts and their moving average are exactly symmetric, also after a round trip through half precision.
    if not torch.equal(values_EE, values_EE.T):
        problems.append(f"not symmetric (largest difference {(values_EE - values_EE.T).abs().max():.3g})")
    return problems
