"""Numbers that describe how tokens are routed: by their selected experts, and by the logits that select them.

Shapes: T tokens, E experts, K experts per token. Selections are indices of distinct experts, integer, in any order.
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
    """Compute each expert's share of all selections, float64. Raises EvaluationError if there are no tokens."""
    if not indices_TK.numel():
        raise EvaluationError("no tokens, so no load")
    counts_E = torch.bincount(indices_TK.reshape(-1).long(), minlength=num_experts).double()
    return counts_E / counts_E.sum()


def normalized_entropy(load_E: Tensor) -> float:
    """Compute the entropy of a load over its maximum, log E: 1 for an even load, 0 if one expert takes every token."""
    return float(torch.special.entr(load_E.double()).sum()) / math.log(len(load_E))


def dead_experts(load_E: Tensor, threshold: float = DEAD) -> list[int]:
    """Return the experts whose load is below `threshold` times the even load, 1 / E."""
    return (load_E < threshold / len(load_E)).nonzero().flatten().tolist()


def router_margin(logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
    """Compute the margin of each token's selection: the lowest selected logit minus the highest other logit, in nats.

    For plain top-K selection it is the gap between the K-th and the (K + 1)-th highest logit. For families that select
    with a bias or in groups, it is negative where the selection is not that of the highest logits. It is float32, and
    infinite where all experts are selected. Shape: (tokens,).

    Source: the margin of a classifier, applied to top-K selection.
    """
    logits_TE, indices_TK = logits_TE.float(), indices_TK.long()
    lowest_T = logits_TE.gather(1, indices_TK).amin(1)
    highest_T = logits_TE.scatter(1, indices_TK, -math.inf).amax(1)
    return lowest_T - highest_T


def flip_rate(before_TK: Tensor, after_TK: Tensor) -> Tensor:
    """Compute the share of each token's experts that change, 1 - |before & after| / K, float64. Shape: (..., tokens).

    The selections are of the same tokens before and after a change of the text or the model. The mean over tokens is
    the flip rate of the routing; 1 minus that mean is what tables call routing stability.
    """
    return (before_TK.unsqueeze(-1) != after_TK.unsqueeze(-2)).all(-1).double().mean(-1)


def router_saturation(indices_TK: Tensor, final_TK: Tensor) -> float:
    """Compute the share of a checkpoint's selections that match those of the final checkpoint; K / E by chance.

    Source: Muennighoff et al., "OLMoE" (arXiv 2409.02060), router saturation: 1/N sum_i |E_i(t) & E_i(T)| / k.
    """
    return 1.0 - float(flip_rate(indices_TK, final_TK).mean())


def coactivation(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Compute how often expert j is selected when expert i is: N_ij / N_i, float64. Shape: (num_experts, num_experts).

    It is 1 on the diagonal, 0 in the row of an expert that was never selected, and not symmetric.

    Source: OLMoE (arXiv 2409.02060), expert co-activation.
    """
    counts_EE = count_coselections(indices_TK, num_experts).double()
    return counts_EE / counts_EE.diagonal().clamp(min=1.0).unsqueeze(1)


def domain_allocation(indices_by_domain: Sequence[Tensor], num_experts: int) -> Tensor:
    """Compute the share of each domain's tokens that select each expert, float64. Shape: (domains, num_experts).

    Rows sum to K; without preferences a value is K / E. Raises EvaluationError if a domain has no tokens.

    Source: OLMoE (arXiv 2409.02060), domain specialization: N_i(k, D) / N_D.
    """
    rows = [load_of_choices(indices, num_experts) * indices.shape[1] for indices in indices_by_domain]
    return torch.stack(rows)


def domain_information(allocation_DE: Tensor) -> float:
    """Compute the mutual information of expert and domain over the entropy of the domains, from `domain_allocation`.

    It is the Jensen-Shannon divergence of the domains' distributions over experts, over its maximum: 0 if all domains
    use the experts alike, 1 if no two share an expert, and slightly above 0 by chance. Each domain counts alike,
    whatever its number of tokens. A single domain has 0.

    Source: Lin, "Divergence Measures Based on the Shannon Entropy" (1991), with equal weights.
    """
    num_domains = len(allocation_DE)
    if num_domains < 2:
        return 0.0
    share_DE = allocation_DE.double() / allocation_DE.double().sum(1, keepdim=True)
    mixed = torch.special.entr(share_DE.mean(0)).sum()
    return float((mixed - torch.special.entr(share_DE).sum(1).mean()).clamp(min=0.0)) / math.log(num_domains)


def cka_matrix(outputs: Iterable[Tensor], unbiased: bool = True) -> Tensor:
    """Compute the linear centered kernel alignment (CKA) of every pair of experts' outputs on the same tokens.

    It is 1 for outputs that differ by a rotation, a shift and a scale, and 0 for uncorrelated or constant outputs. The
    biased estimate is useless with fewer tokens than features, as in large models, where it is near 1 for unrelated
    outputs. The unbiased one is then 0 on average.

    Args:
        outputs: Each expert's output. Only one of them and the Gram matrices are kept in memory. Shape of each:
            (tokens, features).
        unbiased: Whether to use the unbiased estimate of HSIC.

    Raises:
        EvaluationError: If there are fewer than 4 tokens, or their numbers differ.

    Source: Kornblith et al. (arXiv 1905.00414): ||Y'X||^2 / (||X'X|| ||Y'Y||), with centered columns. Deviation, if
    `unbiased`: HSIC is estimated as in Song et al., "Feature Selection via Dependence Maximization" (2012) and in
    Nguyen et al. (arXiv 2010.15327).
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
    cka_EE = torch.where(sizes_EE == 0, 0.0, hsic_EE / sizes_EE)  # NaN where an output is not finite
    return cka_EE.fill_diagonal_(1.0)


def _gram(output_TD: Tensor) -> Tensor:
    """Compute the Gram matrix of centered outputs; the mean would otherwise dominate."""
    output_TD = output_TD.detach().to(device="cpu", dtype=torch.float64)
    output_TD = output_TD - output_TD.mean(0)
    return output_TD @ output_TD.T


def _centered(gram_TT: Tensor) -> Tensor:
    return gram_TT - gram_TT.mean(0) - gram_TT.mean(1, keepdim=True) + gram_TT.mean()
