"""Blocks of the WikiText model: attention, then a mixture of experts or a plain feed-forward network."""

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer

from symphony_hf.models.routers import CosineRouter, LinearRouter, SmoothRouter, TopKRouter
from symphony_hf.models.upcycled_moe import grouped_linear, run_sorted

from .attention import SpanAttention
from .configuration import WikiTextMoeConfig


@use_experts_implementation(has_bias=True, has_gate=False)
class WikiTextMoeExperts(nn.Module):
    """Stacked feed-forward experts: linear, ReLU, dropout, linear."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, inner))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sort the tokens by expert and run each expert on its slice (`experts_implementation="eager"`).

        Args:
            hidden_states: Shape: (tokens, hidden_size).
            top_k_index: Experts of each token. Shape: (tokens, top_k).
            top_k_weights: Weights of those experts. Same shape.

        Returns:
            The weighted sum of the experts' outputs. Shape: (tokens, hidden_size).
        """
        return run_sorted(hidden_states, top_k_index, top_k_weights, self.num_experts, self._run)

    def _run(self, x_SD: Tensor, lengths: list[int]) -> Tensor:
        inner_SI = self.act_fn(grouped_linear(x_SD, self.up_proj, self.up_proj_bias, lengths))
        return grouped_linear(inner_SI, self.down_proj, self.down_proj_bias, lengths)


class MoeFeedForward(nn.Module):
    """Router and experts. Input and output shape: (rows, length, hidden_size)."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__()
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        if config.router_type == "cosine":
            self.gate: TopKRouter = CosineRouter(*sizes, config.router_dim)
        else:
            kind = SmoothRouter if config.router_type == "smooth" else LinearRouter
            self.gate = kind(*sizes, bias=True)
        self.experts = WikiTextMoeExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_TD = hidden.flatten(0, 1)
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        return self.dropout(self.experts(hidden_TD, indices_TK, weights_TK)).view_as(hidden)


class FeedForward(nn.Sequential):
    """Feed-forward network of GLaM's blocks without experts. Input and output shape: (..., hidden_size)."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        up = nn.Linear(config.hidden_size, config.intermediate_size)
        down = nn.Linear(config.intermediate_size, config.hidden_size)
        super().__init__(up, nn.ReLU(), nn.Dropout(config.dropout), down)


class WikiTextMoeBlock(GradientCheckpointingLayer):
    """Attention, then experts or a feed-forward network, each with a residual connection and a norm after it.

    The experts have two of these, as in the code base that the paper's numbers come from. A block uses one of `norm2`
    and `norm3`; the other only matters for the published parameter count, and is frozen.
    """

    def __init__(self, config: WikiTextMoeConfig, layer_idx: int) -> None:
        super().__init__()
        has_experts = layer_idx % config.moe_every == 0
        self.attn = SpanAttention(config, layer_idx)
        self.moe = MoeFeedForward(config) if has_experts else None
        self.ff = None if has_experts else FeedForward(config)
        self.moe_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if has_experts else None
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(3))
        (self.norm3 if has_experts else self.norm2).requires_grad_(False)
        self.momentum, self.momentum_step = config.momentum, config.momentum_step

    def forward(
        self,
        hidden: Tensor,
        velocity: Tensor | None,
        distance_keys_SD: Tensor,
        states: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block.

        Args:
            hidden: Hidden states. Shape: (rows, length, hidden_size).
            velocity: Momentum of the MoE outputs of the blocks before; None in the first. Same shape.
            distance_keys_SD: Distance keys of the attention. Shape: (span, head size).
            states: Hidden states that the attention remembers from earlier blocks of text.
            cache: Keys and values that it remembers.

        Returns:
            Hidden states, and the momentum, which is None in a model without.
        """
        hidden = self.norm1(hidden + self.attn(hidden, distance_keys_SD, states, cache))
        if self.moe is None:
            assert self.ff is not None
            return self.norm3(hidden + self.ff(hidden)), velocity
        assert self.moe_norm is not None
        output = self.moe(hidden)
        if self.momentum is not None:
            output = self.momentum_step * output
            velocity = output if velocity is None else self.momentum * velocity + output
            output = velocity
        return self.norm2(hidden + self.moe_norm(hidden + output)), velocity
