"""From the experts that tokens chose to the matrix that routes them: counts, adjacency, transition."""

import contextlib
from typing import get_args

import torch
from torch import Tensor

from symphony_hf.config import Normalization


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """A region that autocast leaves alone, on the tensor's device: bf16 would round counts over 256, and the graph."""
    if tensor.is_meta:  # autocast knows no such device
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)  # type: ignore[return-value]


def initial_adjacency(num_experts: int, top_k: int, device: torch.device | str | None = None) -> Tensor:
    """The graph before any token was seen: every expert at even load, acquainted with itself alone.

    Its transition matrix is exactly the identity under every normalization (x / x is 1), so a fresh
    Symphony router is bit for bit the base router, and the graph then comes in over about
    1 / (1 - decay) updates. A start at zero would instead jump at the first update, because
    normalizing cancels the moving average's scale.

    Args:
        num_experts: E.
        top_k: Experts chosen per token, K.
        device: Where to put it.

    Returns:
        (K / E) times the identity, float32. Shape: (num_experts, num_experts).

    Source: arXiv 2510.16411 does not publish its start; this one is ours.
    """
    # float32 by an explicit cast: DeepSpeed's zero.Init rewrites tensor constructors to its own dtype.
    return torch.eye(num_experts, device=device).to(torch.float32) * (top_k / num_experts)


def symmetrize(adjacency_EE: Tensor) -> Tensor:
    """Make a learned adjacency symmetric and non-negative: half of A + A^T, negative entries set to 0.

    Bit for bit the adjacency where it is symmetric and non-negative. Shape: (num_experts, num_experts).
    """
    return 0.5 * (adjacency_EE + adjacency_EE.T).clamp(min=0.0)


def count_coselections(indices_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Count, over the tokens of one forward, how often each pair of experts was chosen together.

    Args:
        indices_TK: The experts that each token chose, distinct within a token. Shape: (tokens, top_k), integer.
        num_experts: E.
        mask_T: True (or 1) for tokens that count, False for padding. Shape: (tokens,). All count when None.

    Returns:
        C = S.T @ S with S the 0/1 selection matrix: the diagonal is each expert's load. Float32, holding
        integers exactly up to 2**24. Shape: (num_experts, num_experts).

    Source: arXiv 2510.16411, the social graph of experts chosen together.
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
    """One step of the moving average: `decay * adjacency + (1 - decay) * counts / num_tokens`.

    Args:
        adjacency_EE: The graph so far. Shape: (num_experts, num_experts), float32.
        counts_EE: Co-selections of one update, summed over micro-batches and ranks. Same shape.
        num_tokens: How many tokens made the counts: a scalar tensor, so that nothing waits for the device.
        decay: In [0, 1]; the graph forgets over about 1 / (1 - decay) updates.

    Returns:
        The new adjacency. Where no token was counted, or the counts are not finite (the routers poison
        them with NaN when their logits are not finite), the old one, unchanged. Same shape.

    Source: arXiv 2510.16411, graph learned by a moving average. Deviation: its coefficient is not published.
    """
    updated_EE = decay * adjacency_EE + (1.0 - decay) * (counts_EE / num_tokens)
    usable = (num_tokens > 0) & torch.isfinite(counts_EE).all()
    return torch.where(usable, updated_EE, adjacency_EE)


def transition_matrix(adjacency_EE: Tensor, normalization: Normalization = "row", self_loops: bool = True) -> Tensor:
    """Normalize the social graph into the coefficients by which an expert hears its neighbours.

    Args:
        adjacency_EE: Symmetric, non-negative. Shape: (..., num_experts, num_experts), float32.
        normalization: `row`: D^-1 M, every row sums to 1, which keeps softmax's shift invariance.
            `conditional`: a_jk = adjacency_jk / adjacency_jj, the chance that k is chosen given j; with self
            loops and a fixed top-k every row sums to K. `symmetric`: D^-1/2 M D^-1/2.
        self_loops: Whether an expert hears itself. Without them M has a zero diagonal.

    Returns:
        The transition matrix P. An expert whose row has no mass (never chosen, or underflown below the smallest
        normal float32) keeps the identity's row. Shape: (..., num_experts, num_experts), float32.

    Raises:
        ValueError: If the normalization is unknown.

    Source: arXiv 2510.16411. Deviation: its normalization and its diagonal are not published.
    """
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization: got {normalization!r}, known are {', '.join(get_args(Normalization))}")
    identity_EE = torch.eye(adjacency_EE.shape[-1], device=adjacency_EE.device).to(adjacency_EE.dtype)
    mass_EE = adjacency_EE if self_loops else adjacency_EE * (1.0 - identity_EE)
    degree_E = mass_EE.sum(-1)
    size_E = adjacency_EE.diagonal(dim1=-2, dim2=-1) if normalization == "conditional" else degree_E
    # Below the smallest normal number there is no precision left to divide by.
    tiny = torch.finfo(adjacency_EE.dtype).tiny
    alone_E = (degree_E < tiny) | (size_E < tiny)
    # Divided by 1: a 0 / 0, or the root of 0, would poison a learned graph's gradient even in the branch not taken.
    size_E = torch.where(alone_E, torch.ones_like(size_E), size_E)
    divisor_EE = size_E.unsqueeze(-1)
    if normalization == "symmetric":
        root_E = size_E.sqrt()
        # sqrt(d) * sqrt(d) is d only to rounding: take d itself on the diagonal, so that the start is exact.
        roots_EE = root_E.unsqueeze(-1) * root_E.unsqueeze(-2)
        divisor_EE = torch.where(identity_EE.bool(), divisor_EE, roots_EE)
    return torch.where(alone_E.unsqueeze(-1), identity_EE, mass_EE / divisor_EE)


def mix_with_identity(transition_EE: Tensor, strength: Tensor | float) -> Tensor:
    """The matrix used in routing, `A = (1 - strength) I + strength P`.

    Args:
        transition_EE: P. Shape: (..., num_experts, num_experts).
        strength: In [0, 1]. 0 is the base router.

    Returns:
        A. Written as I + strength (P - I), so that P = I or strength = 0 give exactly I. Same shape.
    """
    identity_EE = torch.eye(transition_EE.shape[-1], device=transition_EE.device).to(transition_EE.dtype)
    return identity_EE + strength * (transition_EE - identity_EE)


def adjacency_problems(adjacency_EE: Tensor, num_experts: int) -> list[str]:
    """What keeps a tensor from being a social graph, in words; an empty list when it is one.

    Args:
        adjacency_EE: Any tensor, perhaps from a file that was tampered with.
        num_experts: E of the router that it is meant for.

    Returns:
        One phrase a problem: wrong shape, not a float type, non-finite, negative, non-symmetric entries, or some that
        float32 cannot normalize.
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
    # What normalizing divides by, and what it divides, must both be in float32's range: a quotient is not, otherwise.
    size_E = values_EE.diagonal()
    size_E = torch.where(size_E < torch.finfo(torch.float32).tiny, torch.ones_like(size_E), size_E)
    if not torch.isfinite(values_EE.sum(-1)).all() or not torch.isfinite(values_EE / size_E.unsqueeze(-1)).all():
        problems.append(f"entries too large, or too far apart, to be normalized (up to {values_EE.max():.3g})")
    num_negative = int((values_EE < 0).sum())
    if num_negative:
        problems.append(f"{num_negative} negative entries")
    # Counts and their moving average are symmetric to the bit; a half-precision detour rounds both sides alike.
    if not torch.equal(values_EE, values_EE.T):
        problems.append(f"not symmetric (largest difference {(values_EE - values_EE.T).abs().max():.3g})")
    return problems
