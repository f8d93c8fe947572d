"""Routers of our own models and of experts that were made of a dense MLP: linear (SMoE) and cosine (XMoE).

Shapes: T tokens, D hidden size, R dimensions of the cosine router's space, E experts, K chosen by a token.
"""

import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.3
"""Where the cosine router's temperature starts."""

LOW_DIMENSIONS = 16
"""Of the cosine router's space at least; half as many as experts where that is more."""


class TopKRouter(nn.Module):
    """Chooses the K highest logits, and weighs them by a softmax over the chosen, so that the weights sum to 1.

    With equal experts their weighted sum is then what one of them gives, whatever the router chooses.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts, as transformers' own routers return it.

        Args:
            hidden_states: Shape: (T, D).

        Returns:
            Logits, shape (T, E), weights, shape (T, K), and the chosen experts, shape (T, K).
        """
        logits_TE = self.compute_logits(hidden_states)
        chosen_TK, indices_TK = logits_TE.topk(self.top_k, dim=-1)
        weights_TK = chosen_TK.softmax(-1, dtype=chosen_TK.float().dtype).to(hidden_states.dtype)
        return logits_TE, weights_TK, indices_TK

    def compute_logits(self, hidden_TD: Tensor) -> Tensor:
        """The affinity of each token to each expert. Shape: (T, D) to (T, E)."""
        raise NotImplementedError


class LinearRouter(TopKRouter):
    """SMoE's: one linear map.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        bias: Whether it has one.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, bias: bool = False) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.linear = nn.Linear(hidden_size, num_experts, bias=bias)

    def compute_logits(self, hidden_TD: Tensor) -> Tensor:
        return self.linear(hidden_TD)


class CosineRouter(TopKRouter):
    """XMoE's: cosines to the experts' embeddings in a space of few dimensions, over a learned temperature.

    Cosines are no linear map of the embeddings, so no embeddings could hold the graph of a folded router. `mix` is the
    linear map that can: the identity, never trained, until a graph is folded into it.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        dimensions: R; half as many as experts when None, but LOW_DIMENSIONS at least.

    Source: arXiv 2204.09179. Deviation: the temperature is learned as its logarithm, so that it stays positive.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, dimensions: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        dimensions = dimensions or max(LOW_DIMENSIONS, num_experts // 2)
        self.reduction = nn.Linear(hidden_size, dimensions, bias=False)
        self.embeddings = nn.Linear(dimensions, num_experts, bias=False)
        self.log_temperature = nn.Parameter(self.embeddings.weight.new_empty(1))
        self.mix = nn.Linear(num_experts, num_experts, bias=False).requires_grad_(False)

    def compute_logits(self, hidden_TD: Tensor) -> Tensor:
        reduced_TR = F.normalize(self.reduction(hidden_TD), dim=-1)
        cosines_TE = F.linear(reduced_TR, F.normalize(self.embeddings.weight, dim=-1))
        return self.mix(cosines_TE / self.log_temperature.exp())


ROUTERS: dict[str, type[TopKRouter]] = {"smoe": LinearRouter, "xmoe": CosineRouter}
