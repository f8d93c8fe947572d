"""Router losses, and the autograd functions that apply each of them exactly once in any training loop.

A training loop scales the loss that the model returns: by accumulation steps, tokens, a loss scaler, or ranks. Router
losses need the same scale, but reentrant checkpointing keeps them from leaving a layer to be added to the main loss.
So their gradient starts at the router, inside the backward pass: `RecordGradientScale` wraps the main loss and records
the gradient that arrives there (backward reaches it before any router), and `AttachLoss` starts each router's loss
with that gradient. Megatron does the same with a scale set by its schedule.
"""

from typing import Any

import torch
from torch import Tensor

from .graph import without_autocast


def _masked_mean(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return the mean over unmasked tokens (dim 0), or 0 if there are none."""
    if mask_T is None:
        return values_T.sum(0) / max(len(values_T), 1)
    kept_T = mask_T.to(values_T).reshape(-1, *[1] * (values_T.dim() - 1))
    return (values_T * kept_T).sum(0) / kept_T.sum().clamp_min(1.0)


def _without_padding(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return float32 logits, zeroed at padding, where attention may leave NaN that a weight of 0 would not remove."""
    logits = logits_TE.float()
    return logits if mask_T is None else logits.masked_fill(~mask_T.bool().to(logits.device).unsqueeze(-1), 0.0)


def load_balancing_loss(
    logits_TE: Tensor, indices_TK: Tensor, mask_T: Tensor | None = None, load_E: Tensor | None = None
) -> Tensor:
    """Compute the load balancing loss: E times the sum over experts of (share of tokens) x (mean probability).

    Args:
        logits_TE: Smoothed logits, from which experts are chosen. Shape: (tokens, num_experts).
        indices_TK: Chosen experts. Shape: (tokens, top_k), integer.
        mask_T: True for real tokens, False for padding. Shape: (tokens,).
        load_E: Buffer that will hold each expert's share of more tokens, of all ranks or of the whole step, by the time
            of the backward pass, which then uses it instead of the local share. Shape: (num_experts,).

    Returns:
        A float32 scalar over the local tokens; K when load and probabilities are even. The gradient flows through
        the probabilities only.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, in the form that transformers uses for top-k.
    Deviation: each layer has its own product; transformers pools all layers into one.
    """
    share_E, probability_E = load_and_probability(logits_TE, indices_TK, mask_T)
    return weigh_probability(share_E, probability_E, load_E)


def load_and_probability(logits_TE: Tensor, indices_TK: Tensor, mask_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the two factors of the load balancing loss.

    Args:
        logits_TE: Smoothed logits. Shape: (tokens, num_experts).
        indices_TK: Chosen experts. Shape: (tokens, top_k), integer.
        mask_T: True for real tokens, False for padding. Shape: (tokens,).

    Returns:
        Each expert's share of the tokens, and its mean probability, with gradient. Shape of each: (num_experts,).
    """
    with without_autocast(logits_TE):
        probabilities_TE = _without_padding(logits_TE, mask_T).softmax(-1)
        chosen_TE = torch.zeros_like(probabilities_TE).scatter(1, indices_TK.long(), 1.0)
        return _masked_mean(chosen_TE, mask_T), _masked_mean(probabilities_TE, mask_T)


def weigh_probability(share_E: Tensor, probability_E: Tensor, load_E: Tensor | None = None) -> Tensor:
    """Return the load balancing loss of its two factors; the arguments are those of `load_balancing_loss`."""
    if load_E is not None:
        return len(share_E) * WeighByLoad.apply(probability_E, share_E, load_E)
    return len(share_E) * (share_E * probability_E).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Compute the router z-loss: the mean squared log-partition of the logits, which keeps them small.

    Args:
        logits_TE: Smoothed logits, in nats. Shape: (tokens, num_experts).
        mask_T: True for real tokens, False for padding. Shape: (tokens,).

    Returns:
        A float32 scalar, in nats squared.

    Source: ST-MoE, arXiv 2202.08906, equation 5. Deviation: none.
    """
    with without_autocast(logits_TE):
        return _masked_mean(_without_padding(logits_TE, mask_T).logsumexp(-1).square(), mask_T)


def _read_scale(gradient: Tensor, scale: Tensor) -> Tensor:
    return scale.to(gradient.device, copy=True)


# An operator with the gradient as an input: otherwise a compiler may read the scale before backward has written it.
_read_scale_operator = torch.library.custom_op("symphony_hf::read_scale", _read_scale, mutates_args=())


@_read_scale_operator.register_fake
def _(gradient: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(scale, device=gradient.device)


class WeighByLoad(torch.autograd.Function):
    """Sum of share x probability over experts, whose gradient uses `load_E`, read in backward, instead of the share.

    The load of all ranks is only known after the forward pass, from one all-reduce for all layers.
    """

    @staticmethod
    def forward(ctx: Any, probability_E: Tensor, share_E: Tensor, load_E: Tensor) -> Tensor:
        ctx.load = load_E  # not save_for_backward: it is updated before backward
        return (share_E * probability_E).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        read = _read_scale_operator if torch.compiler.is_compiling() else _read_scale
        return gradient * read(gradient, ctx.load), None, None


class RecordGradientScale(torch.autograd.Function):
    """Identity on the main loss; its backward writes `gradient * share` into the scalar tensor `scale`, in place.

    If the loss has several elements, which the loop reduces itself, it writes the sum.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        ctx.scale = scale  # not save_for_backward: backward writes to it
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
        # In eager mode, dispatching the operator costs more than the copy itself.
        read = _read_scale_operator if torch.compiler.is_compiling() else _read_scale
        return gradient, read(gradient, ctx.scale), None
