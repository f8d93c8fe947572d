"""Tokens with known correct experts: two each, mostly of one community, with noisy logits.

Shapes: T tokens, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TOP_K = 2


class Planted(NamedTuple):
    """The ground truth.

    Attributes:
        probabilities_EE: Probability that a token's two experts are this pair, in any order; on the diagonal, that an
            expert is one of them. It is the limit of co-selections per token without errors.
        pairs_P2: All pairs of distinct experts, the lower first. Shape: (pairs, 2).
        weights_P: Probability of each pair. Shape: (pairs,).
    """

    probabilities_EE: Tensor
    pairs_P2: Tensor
    weights_P: Tensor


def plant(num_experts: int, num_communities: int, within: float, generator: torch.Generator) -> Planted:
    """Draw a planted graph with communities of equal size. Pairs of experts within one differ in probability."""
    pairs_P2 = torch.combinations(torch.arange(num_experts), TOP_K)
    community_E = torch.arange(num_experts) * num_communities // num_experts
    together_P = community_E[pairs_P2[:, 0]] == community_E[pairs_P2[:, 1]]
    uneven_P = torch.rand(len(pairs_P2), generator=generator) + 0.5
    weights_P = torch.where(
        together_P,
        within * uneven_P / uneven_P[together_P].sum(),
        (1 - within) * uneven_P / uneven_P[~together_P].sum().clamp_min(torch.finfo(torch.float32).tiny),
    )
    half_EE = torch.zeros(num_experts, num_experts).index_put((pairs_P2[:, 0], pairs_P2[:, 1]), weights_P)
    probabilities_EE = half_EE + half_EE.T
    return Planted(probabilities_EE + torch.diag(probabilities_EE.sum(1)), pairs_P2, weights_P)


def draw_tokens(planted: Planted, num_tokens: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw tokens: noisy logits, (T, E), and the correct experts, (T, 2).

    `noise` is the standard deviation of the noise added to each logit; correct experts have 1, all others 0.
    """
    choices_T = torch.multinomial(planted.weights_P, num_tokens, replacement=True, generator=generator)
    right_T2 = planted.pairs_P2[choices_T]
    logits_TE = torch.zeros(num_tokens, len(planted.probabilities_EE)).scatter(1, right_T2, 1.0)
    return logits_TE + noise * torch.randn(logits_TE.shape, generator=generator), right_T2


def share_right(chosen_T2: Tensor, right_T2: Tensor) -> float:
    """Return the share of the correct experts that are among the chosen ones."""
    return float((chosen_T2.unsqueeze(-1) == right_T2.unsqueeze(-2)).any(-1).float().mean())
