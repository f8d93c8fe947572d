"""UpcycledMoE: experts that began as copies of one dense MLP, run through transformers' own experts interface.

The interface takes experts whose output is as wide as their input. Others, such as LLaVA's projector, run here: tokens
sorted by expert, each expert on its slice.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from .grouped import grouped_linear, run_sorted
from .mlp import MlpParts
from .routers import ROUTERS


class ExpertsSettings:
    """What the experts interface reads: the implementation that the model around the experts is set to.

    Args:
        config: Of that model. One without MoE layers of its own says none; then it is grouped_mm, or, where there is no
            accelerator, eager: on a CPU grouped_mm is slower than a loop over experts.
    """

    def __init__(self, config: PreTrainedConfig | None) -> None:
        self.config = config
        self._default = "grouped_mm" if torch.accelerator.is_available() else "eager"

    @property
    def _experts_implementation(self) -> str:
        return getattr(self.config, "_experts_implementation", None) or self._default


class _Experts(nn.Module):
    """The stacked weights of experts, and one way to run them: one expert after the other.

    Args:
        config: See `ExpertsSettings`.
        parts: Of the MLP that every expert begins as a copy of.
        num_experts: E.
    """

    def __init__(self, config: ExpertsSettings, parts: MlpParts, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = parts.act
        stacks = {"up_proj" if parts.kind == "plain" else "gate_up_proj": parts.up, "down_proj": (parts.down,)}
        for name, linears in stacks.items():
            for suffix, attribute in (("", "weight"), ("_bias", "bias")):
                tensors = [getattr(linear, attribute) for linear in linears]
                if tensors[0] is not None:
                    one = torch.cat([tensor.detach() for tensor in tensors])
                    stacked = one.unsqueeze(0).repeat(num_experts, *(1 for _ in one.shape))
                    self.register_parameter(name + suffix, nn.Parameter(stacked))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run `eager`: sorted by expert, and each expert on its slice.

        Args:
            hidden_states: Shape: (tokens, hidden_size).
            top_k_index: The chosen experts. Shape: (tokens, top_k).
            top_k_weights: Theirs. Same shape.

        Returns:
            The weighted sum of the chosen experts' outputs. Shape: (tokens, output_size).
        """
        return run_sorted(hidden_states, top_k_index, top_k_weights, self.num_experts, self._run)

    def _run(self, x_SI: Tensor, lengths: list[int]) -> Tensor:
        """The experts on their slices, without the routing's weights."""
        parameters: Any = self
        name = "gate_up_proj" if parameters.has_gate else "up_proj"
        inner = grouped_linear(x_SI, getattr(self, name), getattr(self, f"{name}_bias", None), lengths)
        if parameters.has_gate:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.act_fn(gate) * up
        else:
            inner = self.act_fn(inner)
        return grouped_linear(inner, parameters.down_proj, getattr(self, "down_proj_bias", None), lengths)


@functools.cache
def _experts_class(has_gate: bool, has_bias: bool, is_square: bool) -> type[_Experts]:
    """The experts of one form, as transformers' interface wants it declared."""
    form = "Gated" if has_gate else "Plain"
    made = type(f"Upcycled{form}Experts", (_Experts,), {"__module__": __name__, "__doc__": _Experts.__doc__})
    if is_square:
        return use_experts_implementation(made, has_gate=has_gate, has_bias=has_bias)  # type: ignore[return-value]
    made.has_gate, made.has_bias = has_gate, has_bias  # type: ignore[attr-defined]
    return made


class UpcycledMoE(nn.Module):
    """A mixture of experts in the place of a dense MLP: any input of shape (..., hidden_size).

    Each expert begins as a copy, and a token's weights sum to 1, so at first it computes what the MLP did.

    Args:
        parts: Of the MLP, see `read_mlp`.
        num_experts: E.
        top_k: Experts a token.
        head: `smoe` or `xmoe`, see `modules.routers`.
        config: Of the model around it: its `experts_implementation` is followed.

    Attributes:
        awaits_checkpoint: Whether it was made for a checkpoint's weights, which must all arrive.
    """

    awaits_checkpoint = False

    def __init__(
        self, parts: MlpParts, num_experts: int, top_k: int, head: str = "smoe", config: PreTrainedConfig | None = None
    ) -> None:
        super().__init__()
        weight = parts.down.weight
        self.gate = ROUTERS[head](parts.up[0].in_features, num_experts, top_k).to(weight.device, weight.dtype)
        is_square = parts.up[0].in_features == parts.down.out_features
        experts_class = _experts_class(parts.kind == "gated", parts.has_bias, is_square)
        self.experts = experts_class(ExpertsSettings(config), parts, num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Send each token to its experts. Shape: (..., hidden_size) to (..., output_size)."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, indices_TK = self.gate(flat)
        output = self.experts(flat, indices_TK, weights_TK)
        return output.view(*hidden_states.shape[:-1], output.shape[-1])
