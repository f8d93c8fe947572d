"""Numbers that describe how tokens were routed: by the experts that they chose, and the logits that chose.

Shapes: T tokens, E experts, K experts per token. Choices are indices of distinct experts, integer, in any order.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from symphony_hf.errors import EvaluationError
from symphony_hf.routing.graph import count_coselections

DEAD = 0.1
"""Share of the even load below which an expert counts as dead."""


def load_of_choices(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Compute each expert\'s share of all choices.

    Args:
        indices_TK: The experts that each token chose. Shape: (tokens, top_k).
        num_experts: E.

    Returns:
        Shares that sum to 1, float64. Shape: (num_experts,).

    Raises:
        EvaluationError: If there is no token.
    """
    if not indices_TK.numel():
        raise EvaluationError("no tokens, so no load")
    counts_E = torch.bincount(indices_TK.reshape(-1).long(), minlength=num_experts).double()
    return counts_E / counts_E.sum()


def normalized_entropy(load_E: Tensor) -> float:
    """Entropy of a load over its maximum, log E: 1 when even, 0 when one expert takes every token.

    Args:
        load_E: Shares that sum to 1. Shape: (num_experts,).
    """
    return float(torch.special.entr(load_E.double()).sum()) / math.log(len(load_E))


def dead_experts(load_E: Tensor, threshold: float = DEAD) -> list[int]:
    """The experts that get less than a tenth of the even load, 1 / E.

    Args:
        load_E: Shares that sum to 1. Shape: (num_experts,).
        threshold: Share of the even load below which an expert is dead.
    """
    return (load_E < threshold / len(load_E)).nonzero().flatten().tolist()


def router_margin(logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
    """Compute the margin of each token\'s choice: its K-th highest logit minus the next.

    In general, the lowest logit that was chosen minus the highest that was not. Where the highest logits choose that is
    the gap between the K-th and the (K + 1)-th. Where a family adds a bias to choose by, or chooses groups first, it is
    negative for the tokens whose choice the logits alone would not have made.

    Args:
        logits_TE: Router logits, in nats. Shape: (tokens, num_experts).
        indices_TK: The experts chosen. Shape: (tokens, top_k).

    Returns:
        In nats, float32; infinite where all experts are chosen. Shape: (tokens,).

    Source: ours; the margin of a classifier, between the last that is in and the first that is out.
    """
    logits_TE, indices_TK = logits_TE.float(), indices_TK.long()
    lowest_T = logits_TE.gather(1, indices_TK).amin(1)
    highest_T = logits_TE.scatter(1, indices_TK, -math.inf).amax(1)
    return lowest_T - highest_T


def flip_rate(before_TK: Tensor, after_TK: Tensor) -> Tensor:
    """Compute the share of each token's experts that change, 1 - |before & after| / K.

    The mean over tokens is the flip rate of the routing; 1 minus that mean is what tables call routing stability.

    Args:
        before_TK: Chosen experts, in any order. Shape: (..., tokens, top_k).
        after_TK: Experts that the same tokens choose after the text or the model has changed. Same shape.

    Returns:
        Values from 0 to 1, float64. Shape: (..., tokens).
    """
    return (before_TK.unsqueeze(-1) != after_TK.unsqueeze(-2)).all(-1).double().mean(-1)


def router_saturation(indices_TK: Tensor, final_TK: Tensor) -> float:
    """Compute the share of a checkpoint\'s expert choices that match those of the final checkpoint.

    Args:
        indices_TK: The experts that a checkpoint chooses for some tokens. Shape: (tokens, top_k).
        final_TK: Those that the final checkpoint chooses for the same tokens. Same shape.

    Returns:
        From 0 to 1; K / E by chance.

    Source: Muennighoff et al., "OLMoE" (arXiv 2409.02060), router saturation: 1/N sum_i |E_i(t) & E_i(T)| / k.
    """
    return 1.0 - float(flip_rate(indices_TK, final_TK).mean())


def coactivation(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Compute how often expert j is chosen when expert i is: N_ij / N_i.

    Args:
        indices_TK: Shape: (tokens, top_k).
        num_experts: E.

    Returns:
        From 0 to 1, 1 on the diagonal, and 0 in the row of an expert that was never chosen. Not symmetric. float64.
        Shape: (num_experts, num_experts).

    Source: OLMoE (arXiv 2409.02060), expert co-activation.
    """
    counts_EE = count_coselections(indices_TK, num_experts).double()
    return counts_EE / counts_EE.diagonal().clamp(min=1.0).unsqueeze(1)


def domain_allocation(indices_by_domain: Sequence[Tensor], num_experts: int) -> Tensor:
    """Compute the share of each domain\'s tokens that chose each expert.

    Args:
        indices_by_domain: Of each domain's tokens. Shape of each: (tokens, top_k).
        num_experts: E.

    Returns:
        Rows that sum to K; K / E is what an expert would get of a domain without preferences. float64. Shape:
        (domains, num_experts).

    Raises:
        EvaluationError: If a domain has no token.

    Source: OLMoE (arXiv 2409.02060), domain specialization: N_i(k, D) / N_D.
    """
    rows = [load_of_choices(indices, num_experts) * indices.shape[1] for indices in indices_by_domain]
    return torch.stack(rows)


def domain_information(allocation_DE: Tensor) -> float:
    """Compute the mutual information of expert and domain over the entropy of the domains.

    Each domain counts alike, however many tokens it has: it is the Jensen-Shannon divergence of the domains'
    distributions over experts, over its maximum.

    Args:
        allocation_DE: From `domain_allocation`. Shape: (domains, num_experts).

    Returns:
        0 where all domains use the experts alike, 1 where no two share one; 0 for a single domain. A little above 0 by
        chance.

    Source: Lin, "Divergence Measures Based on the Shannon Entropy" (1991), with equal weights.
    """
    num_domains = len(allocation_DE)
    if num_domains < 2:
        return 0.0
    share_DE = allocation_DE.double() / allocation_DE.double().sum(1, keepdim=True)
    mixed = torch.special.entr(share_DE.mean(0)).sum()
    return float((mixed - torch.special.entr(share_DE).sum(1).mean()).clamp(min=0.0)) / math.log(num_domains)


def cka_matrix(outputs: Iterable[Tensor], unbiased: bool = True) -> Tensor:
    """Linear centered kernel alignment of every pair of experts: of what they make of the same tokens.

    It is 1 for outputs that differ by a rotation, a shift and a scale, and 0 for uncorrelated ones.

    The plain estimate is no use where tokens are fewer than features, as they are in large models: there unrelated
    outputs have a CKA near 1. Without bias, theirs is 0 on average, and a little below 0 as often as above.

    Args:
        outputs: What each expert makes of the same tokens, one after the other: only their products of tokens with
            tokens are kept. Shape of each: (tokens, features).
        unbiased: Whether to estimate each HSIC without bias.

    Returns:
        Symmetric, 1 on the diagonal; 0 where an expert's outputs do not vary. float64. Shape: (experts, experts).

    Raises:
        EvaluationError: If there are fewer than 4 tokens, or not the same number everywhere.

    Source: Kornblith et al. (arXiv 1905.00414): ||Y'X||^2 / (||X'X|| ||Y'Y||), with centered columns. Deviation, where
    `unbiased`: the estimate of HSIC is that of Song et al., "Feature Selection via Dependence Maximization" (2012), as
    in Nguyen et al. (arXiv 2010.15327).
    """
    grams = [_gram(output_TD) for output_TD in outputs]
    sizes = {len(gram) for gram in grams}
    if len(sizes) != 1 or min(sizes) < 4:
        raise EvaluationError(f"a similarity needs the same 4 tokens or more of every expert, got {sorted(sizes)}")
    grams_ETT = torch.stack([_centered(gram) if not unbiased else gram.fill_diagonal_(0.0) for gram in grams])
    hsic_EE = grams_ETT.flatten(1) @ grams_ETT.flatten(1).T
    if unbiased:
        num_tokens = grams_ETT.shape[1]
        rows_ET = grams_ETT.sum(2)
        total_E = rows_ET.sum(1)
        hsic_EE = (
            hsic_EE
            + torch.outer(total_E, total_E) / ((num_tokens - 1) * (num_tokens - 2))
            - 2 / (num_tokens - 2) * (rows_ET @ rows_ET.T)
        )
    size_E = hsic_EE.diagonal().clamp(min=0.0).sqrt()
    sizes_EE = torch.outer(size_E, size_E)
    cka_EE = torch.where(sizes_EE > 0, hsic_EE / sizes_EE.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return cka_EE.fill_diagonal_(1.0)


def _gram(output_TD: Tensor) -> Tensor:
    """Products of tokens with tokens, of outputs whose mean is taken off first, lest it drown what varies."""
    output_TD = output_TD.detach().to(device="cpu", dtype=torch.float64)
    output_TD = output_TD - output_TD.mean(0)
    return output_TD @ output_TD.T


def _centered(gram_TT: Tensor) -> Tensor:
    return gram_TT - gram_TT.mean(0) - gram_TT.mean(1, keepdim=True) + gram_TT.mean()
