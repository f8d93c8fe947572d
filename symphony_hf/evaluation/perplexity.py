"""Perplexity of a causal language model by document, for paired comparisons of models."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symphony_hf.errors import EvaluationError

from .batching import Batch, Windows, evaluating, flatten, padded_batches


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Likelihood of each document under one model."""

    names: list[str]
    nll: np.ndarray
    """Negative log-likelihood summed over the document's predicted tokens, in nats. Shape: (documents,)."""
    num_tokens: np.ndarray
    """Number of predicted tokens, all but the first of each window. Shape: (documents,), integer."""

    @classmethod
    def of(cls, nll: Mapping[str, np.ndarray]) -> "DocumentScores":
        """Sum the values of each document's predicted tokens, by its name."""
        sums = np.array([values.sum(dtype=np.float64) for values in nll.values()])
        return cls(list(nll), sums, np.array([len(values) for values in nll.values()]))

    @property
    def perplexity(self) -> float:
        """Exponential of the mean NLL per token over all documents, in which long documents weigh more."""
        return float(np.exp(self.nll.sum() / self.num_tokens.sum()))


def next_token_nll(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each token but the first, in nats, float32. Shape: (tokens - 1,)."""
    # float32 one window at a time: a float32 copy of a whole batch of logits would double the peak memory.
    return F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")


def score_documents(
    model: nn.Module, windows: Windows, *, batch_size: int = 16, progress: str | None = None
) -> DocumentScores:
    """Sum the next-token negative log-likelihood over the windows of each document.

    Args:
        model: A causal language model: `model(input_ids=..., attention_mask=...)` returns an output with `.logits` of
            shape (windows, length, vocabulary). Its mode is restored.
        windows: Token ids by document name, in windows without overlap. Shape of each: (2 to block_size,), int64.
        batch_size: Number of windows per forward pass, which changes scores by rounding only.
        progress: Label of the progress bar; no bar when None.

    Raises:
        EvaluationError: If a document has no valid window, or its NLL is not finite.
    """
    return DocumentScores.of(score_tokens(model, windows, batch_size=batch_size, progress=progress))


def score_stream(
    model: nn.Module,
    ids_T: Tensor,
    *,
    block_size: int,
    context: int,
    batch_size: int = 16,
    progress: str | None = None,
) -> DocumentScores:
    """Score one text in overlapping windows, so that every scored token has context.

    Args:
        model: Model, as in `score_documents`.
        ids_T: Token ids, int64. Shape: (tokens,).
        block_size: Number of tokens in a window.
        context: Number of these that are context from the window before and not scored again, from 1 to
            `block_size - 1`.
        batch_size: Number of windows per forward pass.
        progress: Label of the progress bar; no bar when None.

    Returns:
        One score per window, named by its index. Each token but the first of the text is scored once.

    Raises:
        EvaluationError: If there are fewer than two tokens, or a value is not finite.
    """
    step = block_size - context
    starts = range(0, max(len(ids_T) - context, 1), step)
    windows = {str(number): [ids_T[start : start + block_size]] for number, start in enumerate(starts)}
    nll = score_tokens(model, windows, batch_size=batch_size, progress=progress)
    # A window predicts all of its tokens but the first.
    return DocumentScores.of({name: values if name == "0" else values[context - 1 :] for name, values in nll.items()})


def score_tokens(
    model: nn.Module, windows: Windows, *, batch_size: int = 16, progress: str | None = None
) -> dict[str, np.ndarray]:
    """Compute the negative log-likelihood of every predicted token.

    Args:
        model: Model, as in `score_documents`.
        windows: Windows, as in `score_documents`.
        batch_size: Number of windows per forward pass.
        progress: Label of the progress bar; no bar when None.

    Returns:
        Values in nats by document name, in reading order; the first token of each window is not predicted. Shape of
        each: (predicted tokens,), float32.

    Raises:
        EvaluationError: If a document has no valid window, or a value is not finite.
    """
    scores = TokenScores(windows)
    with evaluating(model) as device:
        for batch in padded_batches(scores.flat, batch_size, device, progress):
            scores.add(batch, model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
    return scores.by_document()


class TokenScores:
    """Collects the negative log-likelihood of every predicted token, from the logits of one batch after another.

    Args:
        windows: Windows, as in `score_documents`.

    Attributes:
        windows: The windows.
        flat: All of them, in order.

    Raises:
        EvaluationError: If a document has no valid window.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.flat, self._owners = flatten(windows)
        self._names = list(windows)
        self._by_window: dict[int, np.ndarray] = {}

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take the values of a batch. `logits` have the shape (windows, longest, vocabulary).

        Raises:
            EvaluationError: If a value is not finite.
        """
        lengths = [len(self.flat[index]) for index in batch.indices]
        nll = [next_token_nll(logits[row, :n], batch.input_ids[row, :n]) for row, n in enumerate(lengths)]
        # Synchronize with the device once per batch, not once per window.
        values = torch.cat(nll).cpu().numpy()
        pieces = np.split(values, np.cumsum([length - 1 for length in lengths])[:-1])
        for index, piece in zip(batch.indices, pieces, strict=True):
            if not np.isfinite(piece).all():
                raise EvaluationError(
                    f"document {self._names[self._owners[index]]!r}: the NLL of a window is {piece.sum()}. The model's "
                    "logits are not finite: check the checkpoint, or load it in bfloat16 or float32 instead of float16"
                )
            self._by_window[index] = piece

    def by_document(self) -> dict[str, np.ndarray]:
        """Return the values of each document, as `score_tokens` does. All of its windows must have been added."""
        parts: list[list[np.ndarray]] = [[] for _ in self._names]
        for index, owner in enumerate(self._owners):
            parts[owner].append(self._by_window[index])
        return {name: np.concatenate(pieces) for name, pieces in zip(self._names, parts, strict=True)}
