"""UpcycledMoE: experts that start as copies of one dense MLP, run through transformers' experts interface.

The interface requires equal input and output sizes. Other experts, such as those of LLaVA's projector, run here: tokens
are sorted by expert, and each expert runs on its slice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from .dense_mlp import MlpParts
from .routers import ROUTERS


def run_sorted(
    hidden_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    run: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    """Sort tokens by expert, run the experts, and sum their weighted outputs for each token.

    `run` maps tokens sorted by expert, shape (T * top_k, hidden_size), and the number of tokens of each expert to
    outputs, shape (T * top_k, output_size). The sum has the shape (T, output_size).
    """
    top_k = indices_TK.shape[1]
    sorted_S, order_S = indices_TK.reshape(-1).sort(stable=True)
    lengths = torch.bincount(sorted_S, minlength=num_experts).tolist()
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    outputs_SO = run(_Permuted.apply(hidden_TD, order_S // top_k, places_S.view_as(indices_TK)), lengths)
    # Restore the order of the tokens before summing: on a GPU, index_add_ sums in a different order each run.
    outputs_TKO = _Permuted.apply(outputs_SO, places_S, order_S[:, None]).unflatten(0, (-1, top_k))
    return torch.bmm(weights_TK.to(outputs_SO.dtype)[:, None], outputs_TKO)[:, 0]


class _Permuted(torch.autograd.Function):
    """Rows of a matrix in a given order, each as often as any other.

    The backward gathers and sums, which is deterministic and several times as fast on a CPU as the scatter of `index`.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows_S: Tensor, places_NK: Tensor) -> Tensor:
        """Gather rows.

        Args:
            ctx: Autograd's context.
            x_ND: Matrix. Shape: (N, D).
            rows_S: Row of `x_ND` at each place of the output. Shape: (N * K,).
            places_NK: Places of each row in the output. Shape: (N, K).

        Returns:
            Shape: (N * K, D).
        """
        ctx.save_for_backward(places_NK)
        return x_ND.index_select(0, rows_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (places_NK,) = ctx.saved_tensors
        return grad_SD.index_select(0, places_NK.flatten()).unflatten(0, places_NK.shape).sum(1), None, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Apply each expert's linear layer to its slice of the tokens, which are sorted by expert.

    Args:
        x: Tokens. Shape: (S, input_size).
        weight: Stacked weights. Shape: (num_experts, output_size, input_size).
        bias: Stacked biases. Shape: (num_experts, output_size).
        lengths: Number of tokens of each expert, possibly 0.

    Returns:
        Outputs, in autocast's type if it is on. Shape: (S, output_size).
    """
    # Autocast does not apply inside custom functions, and does not support the meta device.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    output: Tensor = _GroupedLinear.apply(x, weight, bias, list(lengths))
    return output


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, lengths: list[int]) -> Tensor:
        ctx.save_for_backward(x_SI, weight_EOI)
        ctx.lengths = lengths
        out_SO = x_SI.new_empty(len(x_SI), weight_EOI.shape[1])
        # Views are made in single calls: for small experts, the calls of an expert take as long as its products.
        slices = zip(x_SI.split(lengths), weight_EOI.mT.unbind(), out_SO.split(lengths), strict=True)
        if bias_EO is None:
            for x, weight, out in slices:
                torch.mm(x, weight, out=out)
        else:
            for (x, weight, out), bias in zip(slices, bias_EO.unbind(), strict=True):
                torch.addmm(bias, x, weight, out=out)
        return out_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_SI, weight_EOI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x_SI = grad_weight_EOI = grad_bias_EO = None
        grads = grad_SO.split(ctx.lengths)
        if needs_x:
            grad_x_SI = torch.empty_like(x_SI)
            for grad, weight, out in zip(grads, weight_EOI.unbind(), grad_x_SI.split(ctx.lengths), strict=True):
                torch.mm(grad, weight, out=out)
        if needs_weight:
            grad_weight_EOI = torch.empty_like(weight_EOI)
            for grad, x, out in zip(grads, x_SI.split(ctx.lengths), grad_weight_EOI.unbind(), strict=True):
                torch.mm(grad.T, x, out=out)
        if needs_bias:
            grad_bias_EO = weight_EOI.new_empty(weight_EOI.shape[:2])
            for grad, out in zip(grads, grad_bias_EO.unbind(), strict=True):
                torch.sum(grad, 0, out=out)
        return grad_x_SI, grad_weight_EOI, grad_bias_EO, None


class ExpertsSettings:
    """Config for the experts interface, with the experts implementation of the surrounding model.

    Args:
        config: Config of that model. If it sets no implementation, as in models without MoE layers of their own, it is
            grouped_mm with an accelerator, and otherwise eager, which is faster on a CPU.
    """

    def __init__(self, config: PreTrainedConfig | None) -> None:
        self.config = config
        self._default = "grouped_mm" if torch.accelerator.is_available() else "eager"

    @property
    def _experts_implementation(self) -> str:
        return getattr(self.config, "_experts_implementation", None) or self._default


class _Experts(nn.Module):
    """Stacked experts, copies of one MLP, with the eager implementation that runs one after the other."""

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
        """Sort tokens by expert and run each expert on its slice (`experts_implementation="eager"`).

        Args:
            hidden_states: Shape: (tokens, hidden_size).
            top_k_index: Selected experts. Shape: (tokens, top_k).
            top_k_weights: Weights of these experts. Same shape.

        Returns:
            Weighted sum of the selected experts' outputs. Shape: (tokens, output_size).
        """
        return run_sorted(hidden_states, top_k_index, top_k_weights, self.num_experts, self._run)

    def _run(self, x_SI: Tensor, lengths: list[int]) -> Tensor:
        """Run the experts on their slices, without weighting the outputs."""
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
    """Return the class for one form of experts, declared as transformers' interface requires."""
    form = "Gated" if has_gate else "Plain"
    made = type(f"Upcycled{form}Experts", (_Experts,), {"__module__": __name__, "__doc__": _Experts.__doc__})
    if is_square:
        return use_experts_implementation(made, has_gate=has_gate, has_bias=has_bias)  # type: ignore[return-value]
    made.has_gate, made.has_bias = has_gate, has_bias  # type: ignore[attr-defined]
    return made


class UpcycledMoE(nn.Module):
    """Mixture of experts in place of a dense MLP, for inputs of shape (..., hidden_size).

    The experts start as copies and a token's weights sum to 1, so it initially computes what the MLP did.

    Args:
        parts: Parts of the MLP, from `read_mlp`.
        num_experts: E.
        top_k: Number of experts per token.
        router_type: Router type: `smoe` or `xmoe`, see `ROUTERS`.
        config: Config of the surrounding model, whose `experts_implementation` is used.

    Attributes:
        awaits_checkpoint: Whether all weights must still be loaded from a checkpoint.
    """

    awaits_checkpoint = False

    def __init__(
        self,
        parts: MlpParts,
        num_experts: int,
        top_k: int,
        router_type: str = "smoe",
        config: PreTrainedConfig | None = None,
    ) -> None:
        super().__init__()
        weight = parts.down.weight
        self.gate = ROUTERS[router_type](parts.up[0].in_features, num_experts, top_k).to(weight.device, weight.dtype)
        is_square = parts.up[0].in_features == parts.down.out_features
        experts_class = _experts_class(parts.kind == "gated", parts.has_bias, is_square)
        self.experts = experts_class(ExpertsSettings(config), parts, num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run each token through its experts. Shape: (..., hidden_size) to (..., output_size)."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, indices_TK = self.gate(flat)
        output = self.experts(flat, indices_TK, weights_TK)
        return output.view(*hidden_states.shape[:-1], output.shape[-1])
