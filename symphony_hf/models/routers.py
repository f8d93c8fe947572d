"""Routers of the WikiText model and of upcycled MLPs: those of SMoE, XMoE and SmoothSMoE.

Shapes: T tokens, D hidden size, R dimensions of the cosine router's space, E experts, K chosen by a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.3
"""Initial temperature of the cosine router."""

LOW_DIMENSIONS = 16
"""Minimum dimension of the cosine router's space, which is half the number of experts if that is more."""

NEAR_ZONE = 0.1
"""Distance below the last selected logit, in nats, within which the smooth router adds an expert."""

SHARPNESS = 50.0
"""Sharpness of the smooth router's lift: how quickly it rises within the near zone."""


class TopKRouter(nn.Module):
    """Router that selects the K highest logits, with a softmax over them as weights, which so sum to 1.

    With equal experts, the weighted sum equals the output of one expert, whatever the selection.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select experts for hidden states, (T, D).

        Returns:
            Logits, shape (T, E); weights, shape (T, K); selected experts, shape (T, K), as transformers' own routers.
        """
        logits_TE = self.compute_logits(hidden_states)
        chosen_TK, indices_TK = logits_TE.topk(self.top_k, dim=-1)
        weights_TK = chosen_TK.softmax(-1, dtype=chosen_TK.float().dtype).to(hidden_states.dtype)
        return logits_TE, weights_TK, indices_TK

    def compute_logits(self, hidden_TD: Tensor) -> Tensor:
        """Compute the affinity of each token to each expert. Shape: (T, D) to (T, E)."""
        raise NotImplementedError


class LinearRouter(TopKRouter):
    """SMoE's router: one linear layer."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, bias: bool = False) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.linear = nn.Linear(hidden_size, num_experts, bias=bias)

    def compute_logits(self, hidden_TD: Tensor) -> Tensor:
        return self.linear(hidden_TD)


class SmoothRouter(LinearRouter):
    """SmoothSMoE's router: linear, with a soft contribution of the expert just below the top-k.

    With g_K the last selected logit, g the next one, and u = 1 - (g_K - g) / width its nearness, the next expert
    contributes with the logit g + S(u), S(u) = -softplus(SHARPNESS log(1 - u) - log u), if u > 0. The lift S is minus
    infinity at u = 0 and zero at u = 1, where the two experts swap ranks, so that the weights do not jump. If no expert
    is near, this is `LinearRouter`. The selection is still the top-k; the added expert is not part of it. E must be
    more than K, and `width` is in nats.

    Source: arXiv 2606.19036. Deviation: the width is fixed, not learned by a loss on the number of experts; and only
    one expert is added although several may be near, so the output jumps where two of these swap ranks.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, bias: bool = False, width: float = NEAR_ZONE
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, bias)
        self.width = width

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select experts as `TopKRouter.forward`, plus one more per token, last, with weight 0 if it is not near."""
        logits_TE = self.compute_logits(hidden_states)
        highest_TK, indices_TK = logits_TE.float().topk(self.top_k + 1, dim=-1)
        chosen_TK, below_T1 = highest_TK.split([self.top_k, 1], dim=-1)
        nearness_T1 = 1.0 - (chosen_TK[:, -1:] - below_T1) / self.width
        is_near_T1 = nearness_T1 > 0
        # Clamped even if it is not near, so that masked entries have no NaN gradient.
        eps = torch.finfo(torch.float32).eps
        u_T1 = torch.where(is_near_T1, nearness_T1, 0.5).clamp(eps, 1 - eps)
        lift_T1 = -F.softplus(SHARPNESS * (1 - u_T1).log() - u_T1.log())
        lifted_T1 = (below_T1 + lift_T1).masked_fill(~is_near_T1, float("-inf"))
        weights_TK = torch.cat([chosen_TK, lifted_T1], dim=-1).softmax(-1)
        return logits_TE, weights_TK.to(hidden_states.dtype), indices_TK


class CosineRouter(TopKRouter):
    """XMoE's router: cosine similarity to expert embeddings in a low-dimensional space, over a learned temperature.

    Cosines are not linear in the embeddings, so a graph cannot be folded into these. It is folded into `mix` instead, a
    linear layer that is the identity and never trained. The space has by default half as many dimensions as there are
    experts, but at least LOW_DIMENSIONS.

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
