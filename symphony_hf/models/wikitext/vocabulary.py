"""LM head and cross-entropy for a large vocabulary, without all logits in memory.

Shapes: T tokens, C tokens of a chunk, D hidden size, V words.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from symphony_hf.routing.graph import without_autocast

IGNORED = -100
"""Label that is ignored, PyTorch's usual value."""

_ROWS = 64
"""Minimum number of tokens in a chunk."""

_CPU_CHUNK = 1 << 19
"""Number of logits in a chunk on a CPU, small enough to stay in its caches."""

_CHUNK = 1 << 28
"""Number of logits in a chunk on other devices."""


class VocabularyHead(nn.Linear):
    """Linear layer that returns logits, or the negative log-likelihood of labels."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        """Compute logits, or the loss of labels without all logits in memory at once.

        Args:
            hidden: Hidden states. Shape: (..., hidden_size).
            labels: Word ids; -100 is ignored. Shape: (...).
            reduction: `sum`: summed loss, with a gradient. `none`: loss of each label, without a gradient.

        Returns:
            Logits, shape (..., vocab_size). With labels, the negative log-likelihood in nats, float32: a scalar, or a
            tensor of the labels' shape with 0 at ignored labels.
        """
        if labels is None:
            return super().forward(hidden)
        counted = labels != IGNORED
        hidden_TD, labels_T = hidden[counted].to(self.weight.dtype), labels[counted]
        # Checked here: inside a Function's forward, gradients are always off, yet its inputs still require them.
        has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, self.weight, self.bias))
        with without_autocast(hidden):
            if reduction == "sum" and has_gradient:
                return _SummedNll.apply(hidden_TD, self.weight, self.bias, labels_T)
            with torch.no_grad():
                nll_T = torch.cat([_nll(*chunk)[0] for chunk in _chunks(hidden_TD, self.weight, self.bias, labels_T)])
        if reduction == "sum":
            return nll_T.sum()
        return torch.zeros(labels.shape, device=nll_T.device).masked_scatter(counted, nll_T)


def next_word_loss(
    head: nn.Module, hidden: Tensor, *, shift_labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Compute the mean negative log-likelihood of the next words.

    Args:
        head: `VocabularyHead`.
        hidden: Hidden states. Shape: (rows, length, hidden_size).
        shift_labels: Word after each position; -100 is ignored. Shape: (rows, length).
        num_items_in_batch: Number of predicted words in the whole optimizer step, as counted by Trainer, to divide by
            instead of this batch's.
    """
    total = head(hidden, shift_labels)
    return total / ((shift_labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


class _SummedNll(torch.autograd.Function):
    """Summed negative log-likelihood, whose gradients are computed in the forward while a chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_T: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden_TD.device, dtype=torch.float32)
        # The bias is treated as the weight of a column of ones.
        hidden_1TD = F.pad(hidden_TD, (0, 1), value=1.0)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_1VD = torch.zeros(len(weight_VD), hidden_1TD.shape[1], device=total.device, dtype=torch.float32)
        start = 0
        for chunk in _chunks(hidden_TD, weight_VD, bias_V, labels_T):
            nll_C, probabilities_CV = _nll(*chunk)
            total += nll_C.sum()
            rows = slice(start, start := start + len(nll_C))
            torch.mm(probabilities_CV.to(weight_VD.dtype), weight_VD, out=grad_hidden_TD[rows])
            grad_weight_1VD.addmm_(probabilities_CV.T, hidden_1TD[rows].float())
        # The gradient of the logits is the probabilities minus one at the label.
        grad_hidden_TD -= weight_VD[labels_T]
        grad_weight_1VD.index_add_(0, labels_T, hidden_1TD.float(), alpha=-1)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_1VD.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden_TD, grad_weight_1VD = ctx.saved_tensors
        return grad_hidden_TD * grad, grad_weight_1VD[:, :-1] * grad, grad_weight_1VD[:, -1] * grad, None


def _chunks(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (C, V) in float32 and labels (C,) of a few tokens at a time."""
    chunk = _CPU_CHUNK if hidden_TD.device.type == "cpu" else _CHUNK
    rows = max(_ROWS, chunk // len(weight_VD))
    for hidden_CD, labels_C in zip(hidden_TD.split(rows), labels_T.split(rows), strict=True):
        yield torch.addmm(bias_V, hidden_CD, weight_VD.T).float(), labels_C


def _nll(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return negative log-likelihoods (C,) and probabilities (C, V)."""
    probabilities_CV = logits_CV.softmax(-1)
    # The normalizer is computed from the highest logit, whose probability does not underflow, while the label's may.
    # Only the maxima are used: on a CPU, finding their index takes as long as a softmax.
    log_normalizer_C = logits_CV.amax(-1) - probabilities_CV.amax(-1).log()
    return log_normalizer_C - logits_CV.gather(1, labels_C[:, None])[:, 0], probabilities_CV
