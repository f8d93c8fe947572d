"""Routers of our own models and of experts that were made of a dense MLP: SMoE's, XMoE's, SmoothSMoE's.

Shapes: T tokens, D hidden size, R dimensions of the cosine router's space, E experts, K chosen by a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.3
"""Where the cosine router's temperature starts."""

LOW_DIMENSIONS = 16
"""Of the cosine router's space at least; half as many as experts where that is more."""

NEAR_ZONE = 0.1
"""Below the last chosen logit, in nats, within which the smooth router lifts an expert in."""

SHARPNESS = 50.0
"""Of the smooth router's lift: how soon in the near zone it is over."""


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


class SmoothRouter(LinearRouter):
    """SmoothSMoE's: a linear router that lifts the expert just below the cut in, softly, as it nears it.

    With g_K the last chosen logit, g the next one, and u = 1 - (g_K - g) / width its nearness, the expert below takes
    part with the logit g + S(u), S(u) = -softplus(SHARPNESS log(1 - u) - log u), if 0 < u: minus infinity at u = 0, and
    nothing at u = 1, where the two trade places, so that their weights do not jump. Where none is near, this is
    `LinearRouter`. The K highest are the choice; what is lifted in only adds to it.

    Args:
        hidden_size: D.
        num_experts: E, more than K.
        top_k: K.
        bias: Whether it has one.
        width: Of the near zone, in nats of the logits.

    Source: arXiv 2606.19036. Deviation: the width is given, not learned by a loss that aims at a number of experts; and
        one expert is lifted in, where more than one may be near: it jumps where two of these trade places.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, bias: bool = False, width: float = NEAR_ZONE
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, bias)
        self.width = width

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `TopKRouter.forward`, with one more expert a token, last, of weight 0 where it is not near."""
        logits_TE = self.compute_logits(hidden_states)
        highest_TK, indices_TK = logits_TE.float().topk(self.top_k + 1, dim=-1)
        chosen_TK, below_T1 = highest_TK.split([self.top_k, 1], dim=-1)
        nearness_T1 = 1.0 - (chosen_TK[:, -1:] - below_T1) / self.width
        is_near_T1 = nearness_T1 > 0
        # Clamped where it is not near, too, so that no gradient comes of what is masked.
        eps = torch.finfo(torch.float32).eps
        u_T1 = torch.where(is_near_T1, nearness_T1, 0.5).clamp(eps, 1 - eps)
        lift_T1 = -F.softplus(SHARPNESS * (1 - u_T1).log() - u_T1.log())
        lifted_T1 = (below_T1 + lift_T1).masked_fill(~is_near_T1, float("-inf"))
        weights_TK = torch.cat([chosen_TK, lifted_T1], dim=-1).softmax(-1)
        return logits_TE, weights_TK.to(hidden_states.dtype), indices_TK


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
