"""How alike two experts are in what they make of the same tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import EvaluationError


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
