"""Router losses, and how they reach the router once, whatever the loop does with the main loss.

A loop scales the loss that the model returns: by accumulation steps, by tokens, by a loss scaler, by ranks. A
router loss must be scaled alike, and reentrant checkpointing lets no router loss out of a layer to be added to
the main one. So its gradient starts at the router, inside the backward pass: `RecordGradientScale` sits on the
main loss and notes the factor that its gradient arrives with (backward begins there, before any router), and
`AttachLoss` starts each router's loss with that factor. Megatron does the same with a scale set by its schedule.
"""

from typing import Any

import torch
from torch import Tensor

from .graph import without_autocast


def _masked_mean(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over dim 0 of the tokens that count; 0 where none does."""
    if mask_T is None:
        return values_T.sum(0) / max(len(values_T), 1)
    kept_T = mask_T.to(values_T).reshape(-1, *[1] * (values_T.dim() - 1))
    return (values_T * kept_T).sum(0) / kept_T.sum().clamp_min(1.0)


def _without_padding(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Logits in float32, those of padding 0: NaN there, as attention may leave it, would survive a weight of 0."""
    logits = logits_TE.float()
    return logits if mask_T is None else logits.masked_fill(~mask_T.bool().to(logits.device).unsqueeze(-1), 0.0)


def load_balancing_loss(
    logits_TE: Tensor, indices_TK: Tensor, mask_T: Tensor | None = None, load_E: Tensor | None = None
) -> Tensor:
    """E times the sum over experts of (share of tokens that chose it) x (mean probability it was given).

    Args:
        logits_TE: The logits that chose: the smoothed ones. Shape: (tokens, num_experts).
        indices_TK: The experts chosen. Shape: (tokens, top_k), integer.
        mask_T: True for tokens that count. Shape: (tokens,).
        load_E: Where the share of all ranks' tokens that chose each expert will be when the backward runs; the
            gradient then takes it in place of these tokens' own. Shape: (num_experts,).

    Returns:
        A float32 scalar of these tokens; K when load and probabilities are even. The gradient reaches the logits
        through the probabilities alone.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, in the form transformers uses for top-k.
    Deviation: none; transformers pools all layers into one product, here each layer has its own.
    """
    num_experts = logits_TE.shape[-1]
    with without_autocast(logits_TE):
        probabilities_TE = _without_padding(logits_TE, mask_T).softmax(-1)
        chosen_TE = torch.zeros_like(probabilities_TE).scatter(1, indices_TK.long(), 1.0)
        share_E = _masked_mean(chosen_TE, mask_T)
        probability_E = _masked_mean(probabilities_TE, mask_T)
        if load_E is not None:
            return num_experts * WeighByLoad.apply(probability_E, share_E, load_E)
        return num_experts * (share_E * probability_E).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-partition of the router, which keeps logits small.

    Args:
        logits_TE: The logits that chose: the smoothed ones, in nats. Shape: (tokens, num_experts).
        mask_T: True for tokens that count. Shape: (tokens,).

    Returns:
        A float32 scalar, in nats squared.

    Source: ST-MoE, arXiv 2202.08906, equation 5. Deviation: none.
    """
    with without_autocast(logits_TE):
        return _masked_mean(_without_padding(logits_TE, mask_T).logsumexp(-1).square(), mask_T)


def _read_scale(gradient: Tensor, scale: Tensor) -> Tensor:
    return scale.to(gradient.device, copy=True)


# An operator that takes the gradient: a compiler would otherwise read the scale before the backward has written it.
_read_scale_operator = torch.library.custom_op("symphony_hf::read_scale", _read_scale, mutates_args=())


@_read_scale_operator.register_fake
def _(gradient: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(scale, device=gradient.device)


class WeighByLoad(torch.autograd.Function):
    """The sum of share x probability over experts; its gradient has a load in place of the share, read in backward.

    The load of all ranks is known after the forward, in one all-reduce for all layers.
    """

    @staticmethod
    def forward(ctx: Any, probability_E: Tensor, share_E: Tensor, load_E: Tensor) -> Tensor:
        ctx.load = load_E  # not saved for backward: it changes until then
        return (share_E * probability_E).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        read = _read_scale_operator if torch.compiler.is_compiling() else _read_scale
        return gradient * read(gradient, ctx.load), None, None


class RecordGradientScale(torch.autograd.Function):
    """Identity on the main loss; its backward writes `gradient * share` into a scalar tensor `scale`, in place.

    Of a tensor whose elements the loop makes its loss of, it writes the sum.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        ctx.scale = scale  # not saved for backward: the point is to change it there
        return loss.clone()  # not a view: models add to their loss in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (share,) = ctx.saved_tensors
        ctx.scale.copy_((gradient.float() * share).sum())
        return gradient, None, None


class AttachLoss(torch.autograd.Function):
    """Identity on a tensor that the experts use; its backward also starts `loss`, with the recorded `scale`."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return carrier.clone()  # not a view: blocks renormalize in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        # Eager needs no operator, whose call costs more than the copy.
        read = _read_scale_operator if torch.compiler.is_compiling() else _read_scale
        return gradient, read(gradient, ctx.scale), None
