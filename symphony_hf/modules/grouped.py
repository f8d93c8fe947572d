"""Experts on their own slices of the tokens, with one gradient for each stack of their weights.

Indexing the stack gives each expert's gradient the size of the whole stack, and the sum of them costs more than the
matrix products. Here each product writes into its place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def run_sorted(
    hidden_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    run: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    """Sort the chosen tokens by expert, run the experts, and sum their outputs for each token.

    Args:
        hidden_TD: Tokens. Shape: (T, hidden_size).
        indices_TK: The chosen experts. Shape: (T, top_k).
        weights_TK: Theirs. Same shape.
        num_experts: E.
        run: The experts: tokens sorted by expert (T * top_k, hidden_size), and how many of them each has, to outputs
            (T * top_k, output_size).

    Returns:
        Shape: (T, output_size).
    """
    sorted_S, order_S = indices_TK.reshape(-1).sort(stable=True)
    lengths = torch.bincount(sorted_S, minlength=num_experts).tolist()
    outputs_SO = run(hidden_TD[order_S // indices_TK.shape[1]], lengths)
    # Back into the tokens' order, then summed: index_add_ would sum in another order at each run on a GPU.
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    weights_TK = weights_TK.to(outputs_SO.dtype)
    return F.embedding_bag(places_S.view_as(indices_TK), outputs_SO, per_sample_weights=weights_TK, mode="sum")


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Apply each expert's linear map to its slice.

    Args:
        x: Tokens, sorted by expert. Shape: (S, input_size).
        weight: Shape: (num_experts, output_size, input_size).
        bias: Shape: (num_experts, output_size).
        lengths: How many of the tokens each expert has; 0 for one that nobody chose.

    Returns:
        Shape: (S, output_size), in autocast's type where that is on.
    """
    # Autocast does not look into functions of one's own. The meta device has none.
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
        for expert, (x, out) in enumerate(zip(x_SI.split(lengths), out_SO.split(lengths), strict=True)):
            if bias_EO is None:
                torch.mm(x, weight_EOI[expert].T, out=out)
            else:
                torch.addmm(bias_EO[expert], x, weight_EOI[expert].T, out=out)
        return out_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_SI, weight_EOI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x_SI = torch.empty_like(x_SI) if needs_x else None
        grad_weight_EOI = torch.empty_like(weight_EOI) if needs_weight else None
        grad_bias_EO = weight_EOI.new_empty(weight_EOI.shape[:2]) if needs_bias else None
        start = 0
        for expert, length in enumerate(ctx.lengths):
            part, start = slice(start, start + length), start + length
            grad = grad_SO[part]
            if grad_x_SI is not None:
                torch.mm(grad, weight_EOI[expert], out=grad_x_SI[part])
            if grad_weight_EOI is not None:
                torch.mm(grad.T, x_SI[part], out=grad_weight_EOI[expert])
            if grad_bias_EO is not None:
                torch.sum(grad, 0, out=grad_bias_EO[expert])
        return grad_x_SI, grad_weight_EOI, grad_bias_EO, None
