"""Selection by the graph: each expert after the first is chosen by its logit given those that are chosen already.

An experiment of studies alone. The package's routers select the top-k of smoothed logits, which other engines run too.
Shapes: T tokens, E experts, K chosen by a token.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from symphony_hf.models.routers import LinearRouter
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.symphonize import symphony_routers


class ConditionalRouter(LinearRouter):
    """Linear router that selects greedily by conditional logits. Its weights are a softmax over the plain logits.

    The first expert has the highest logit. Having chosen i, an expert j is preferred by P(j chosen | i chosen) -
    P(j chosen), the regression of one choice on the other by the covariance of co-selections; more chosen experts add
    up. A graph without edges changes nothing.

    Attributes:
        preference_EE: Preference of each expert (columns) given a chosen one (rows). Shape: (E, E).

    Source: the greedy selection of MP-MoE. Deviation: the covariance is that of the co-selection graph.
    """

    preference_EE: Tensor

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select experts as `TopKRouter.forward` does, but by conditional logits."""
        logits_TE = self.compute_logits(hidden_states)
        conditional_TE = logits_TE.detach().clone()
        chosen: list[Tensor] = []
        for _ in range(self.top_k):
            chosen_T = conditional_TE.argmax(-1)
            chosen.append(chosen_T)
            conditional_TE = conditional_TE + self.preference_EE[chosen_T]
            conditional_TE.scatter_(1, torch.stack(chosen, dim=1), float("-inf"))
        indices_TK = torch.stack(chosen, dim=1)
        chosen_TK = logits_TE.gather(1, indices_TK)
        weights_TK = chosen_TK.softmax(-1, dtype=chosen_TK.float().dtype).to(hidden_states.dtype)
        return logits_TE, weights_TK, indices_TK


def preferences(adjacency_EE: Tensor) -> Tensor:
    """Compute how much more often than on average each expert (columns) is chosen with another one (rows).

    Args:
        adjacency_EE: Shares of tokens that choose two experts together, and each expert on the diagonal. Shape: (E, E).

    Returns:
        P(column | row) - P(column), with zeros in rows of experts that are never chosen. Shape: (E, E).
    """
    load_E = adjacency_EE.diagonal()
    conditional_EE = adjacency_EE / load_E.clamp(min=torch.finfo(adjacency_EE.dtype).tiny)[:, None]
    return torch.where(load_E[:, None] > 0, conditional_EE - load_E, 0.0)


def select_conditionally(model: PreTrainedModel) -> None:
    """Replace the linear routers of a model, before it is symphonized, by conditional ones without preferences."""
    for module in list(model.modules()):
        if type(module) is LinearRouter:
            module.__class__ = ConditionalRouter
            empty = torch.zeros(module.num_experts, module.num_experts)
            module.register_buffer("preference_EE", empty, persistent=False)


@torch.no_grad()
def follow_graphs(model: PreTrainedModel) -> None:
    """Set the preferences of conditional routers by their graphs, after an update of these."""
    for _, router in symphony_routers(model):
        if isinstance(router, ConditionalRouter):
            router.preference_EE.copy_(preferences(active_graph(router.symphony).adjacency))
