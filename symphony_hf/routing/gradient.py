"""The router's gradient from experts that a token did not choose.

A token chooses the experts S, and N are the others that take part. With E_i(x) the output of expert i, the layer's
output is y = sum_{i in S} w_i(g) E_i(x). Its gradient tells the logits g nothing of experts outside S, one of which may
be better. Instead, the logits get the gradient of the mixture that the router would make of S and N,

    sum_{i in S + N} v_i(g) E_i(x),    v(g) = c u(g),

with u the weights that the family would give to S + N, and c the constant, without gradient, that makes those of S the
stock ones: v_i = w_i. The forward remains y, bit for bit. Each v_i passes its gradient, <dL/dy, E_i(x)>, to the logits
alone, so the experts and their input get the stock gradient through the w_i. With s_i = exp(g_i) or sigmoid(g_i):

- Weights divided by their sum (Mixtral, DeepSeek-V3): u_i = s_i / sum_{S + N} s_j. The sum over S + N also replaces
  that over S in the gradient of the chosen experts' weights.
- Other weights (OLMoE's softmax over all experts, or a plain sigmoid): u_i is the score itself, and the chosen experts'
  weights keep their stock gradient.

A family's scaling factor is part of w, hence of c. Biases and groups decide which experts are chosen, not what they
weigh, so u has neither. An expert outside a token's groups can take part: its logit can bring its group in. With N
empty this is the stock gradient, and with N all others that of the dense mixture.

Source: DenseMixer, for softmax routers and all others. Deviation: N may be a part of the others; sigmoid scores.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .graph import without_autocast

ScoringFunc = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Weighting:
    """How a router makes the weights of the chosen experts from its logits, up to a constant factor.

    Attributes:
        scoring_func: Function that makes scores of logits.
        renormalized: Whether the chosen experts' scores are divided by their sum.
    """

    scoring_func: ScoringFunc
    renormalized: bool


def mixture_weights(
    logits_TE: Tensor, weights_TK: Tensor, chosen_TK: Tensor, others_TN: Tensor, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """Return the weights v of the chosen and of the other experts, in whose gradient both take part.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        weights_TK: Weights of the chosen experts, as the router gives them. Shape: (tokens, top_k).
        chosen_TK: The chosen experts. Shape: (tokens, top_k).
        others_TN: The other experts that take part; -1 for none. Shape: (tokens, n).
        weighting: How the router makes its weights.

    Returns:
        Weights of the chosen experts, equal to `weights_TK` up to rounding, and of the others, 0 for none. In the
        weights' dtype. Shapes: (tokens, top_k) and (tokens, n).
    """
    with without_autocast(logits_TE):
        logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        is_none_TN, others_TN = others_TN < 0, others_TN.clamp(min=0).long()
        if weighting.renormalized:
            taken = torch.cat([logits.gather(1, chosen_TK.long()), logits.gather(1, others_TN)], dim=1)
            is_none = torch.cat([torch.zeros_like(chosen_TK, dtype=torch.bool), is_none_TN], dim=1)
            if weighting.scoring_func == "softmax":
                scores = taken.masked_fill(is_none, float("-inf")).softmax(-1)
            else:
                scores = taken.sigmoid().masked_fill(is_none, 0.0)
                scores = scores / scores.sum(-1, keepdim=True)
            chosen, others = scores.split([chosen_TK.shape[1], others_TN.shape[1]], dim=1)
        else:
            scores = logits.softmax(-1) if weighting.scoring_func == "softmax" else logits.sigmoid()
            chosen = scores.gather(1, chosen_TK.long())
            others = scores.gather(1, others_TN).masked_fill(is_none_TN, 0.0)
        mass_T1 = chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(chosen.dtype).tiny)
        constant_T1 = (weights_TK.to(chosen.dtype).sum(-1, keepdim=True) / mass_T1).detach()
        chosen = constant_T1 * chosen if weighting.renormalized else weights_TK
        return chosen.to(weights_TK.dtype), (constant_T1 * others).to(weights_TK.dtype)


def all_others(chosen_TK: Tensor, num_experts: int) -> Tensor:
    """Return the experts that each token did not choose, in order. Shape: (tokens, num_experts - top_k)."""
    order_TE = _chosen_mask(chosen_TK, num_experts).to(torch.int8).sort(dim=1, stable=True).indices
    return order_TE[:, : num_experts - chosen_TK.shape[1]]


def nearest_others(chosen_TK: Tensor, transition_EE: Tensor, num_neighbours: int) -> Tensor:
    """Return the experts that the graph gives the chosen ones most: those with the largest sum over S of P_ij.

    Args:
        chosen_TK: The chosen experts. Shape: (tokens, top_k).
        transition_EE: The graph's matrix P, by whichever normalization. Shape: (num_experts, num_experts).
        num_neighbours: n.

    Returns:
        The neighbours, -1 where fewer than n have a positive sum. Shape: (tokens, n).
    """
    chosen_TE = _chosen_mask(chosen_TK, len(transition_EE))
    with without_autocast(transition_EE):
        nearness_TE = chosen_TE.to(transition_EE.dtype) @ transition_EE
    nearness_TE = nearness_TE.masked_fill(chosen_TE, float("-inf"))
    nearness_TN, others_TN = nearness_TE.topk(num_neighbours, dim=1)
    return others_TN.masked_fill(nearness_TN <= 0, -1)


def random_others(
    chosen_TK: Tensor, num_experts: int, num_others: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw experts from those that each token did not choose, without repetition. Shape: (tokens, num_others)."""
    draws_TE = torch.rand(len(chosen_TK), num_experts, generator=generator, device=chosen_TK.device)
    return draws_TE.masked_fill(_chosen_mask(chosen_TK, num_experts), -1.0).topk(num_others, dim=1).indices


def _chosen_mask(chosen_TK: Tensor, num_experts: int) -> Tensor:
    mask_TE = torch.zeros(len(chosen_TK), num_experts, dtype=torch.bool, device=chosen_TK.device)
    return mask_TE.scatter(1, chosen_TK.long(), True)
