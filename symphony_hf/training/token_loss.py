"""A Trainer that evaluates the mean cross-entropy over all tokens of a dataset."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer
from transformers.utils import logging

from symphony_hf.data.blocks import NO_LABEL
from symphony_hf.errors import EvaluationError

logger = logging.get_logger(__name__)

_CHUNK = 1024
"""Number of positions whose logits are in float32 at the same time: those of a whole batch would fill the memory."""


class TokenLossTrainer(Trainer):
    """transformers' Trainer with `token_loss`.

    The loss of its `evaluate` is what training minimizes, which a model's own balance loss, label smoothing or TRL's
    `loss_type` change, and it depends on how rows are put into batches.
    """

    _sums: Tensor | None = None  # of losses, and of tokens in them, while `token_loss` runs. Shape: (2,)

    def token_loss(self, dataset: Any, split: str) -> float:
        """Return the mean cross-entropy of all tokens with a label, in nats, and log it. Every process calls this.

        It is computed in float32 from the model's logits, whatever training minimizes. Labels are those of the next
        token; of an encoder-decoder, those of the same position. In a run of several processes, TRL's `padding_free`
        makes one row of each batch, and examples that fill up the last batch count twice.

        Args:
            dataset: Rows to evaluate.
            split: Prefix of the logged metrics.

        Returns:
            The loss; NaN, with a warning, if no token has a label.

        Raises:
            EvaluationError: If the model returns no logits for each label.
        """
        self._sums = torch.zeros(2, dtype=torch.float64)
        try:
            return self.evaluate(dataset, metric_key_prefix=split)[f"{split}_loss"]
        finally:
            self._sums = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        if self._sums is None:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        config = getattr(self.model, "config", None)
        own_R2 = summed_losses(model, inputs, getattr(config, "is_encoder_decoder", False))
        all_R2 = self.accelerator.gather_for_metrics(own_R2)  # drops rows that only fill up the last batch
        self._sums += all_R2.cpu().double().sum(0)  # in this order: Apple's GPUs have no float64
        loss = all_R2[:, 0].sum() / all_R2[:, 1].sum().clamp(min=1)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        if self._sums is not None:
            losses, num_tokens = self._sums.tolist()
            split = kwargs["metric_key_prefix"]
            if not num_tokens:
                logger.warning(f"no token of the {split} split has a label: its loss is nan")
            output.metrics[f"{split}_loss"] = losses / num_tokens if num_tokens else float("nan")
        return output


def summed_losses(model: Any, inputs: Mapping[str, Any], is_encoder_decoder: bool = False) -> Tensor:
    """Return each row's summed cross-entropy, in nats, and its number of tokens. Shape: (rows, 2), float32.

    Args:
        model: The model, wrapped or not.
        inputs: Batch with `labels`, or with `shift_labels` of the next tokens where sequences are split over processes.
        is_encoder_decoder: Whether labels are those of the same position, and the model makes inputs of them.

    Raises:
        EvaluationError: If the model returns no logits for each label.
    """
    left_out = {"shift_labels", "skip_logits"} | ({"labels"} if not is_encoder_decoder else set())
    shifted = inputs.get("shift_labels")
    labels = inputs["labels"] if shifted is None else shifted
    outputs = model(**{name: value for name, value in inputs.items() if name not in left_out})
    logits = getattr(outputs, "logits", None)
    if logits is None or logits.shape[:-1] != labels.shape:
        found = "none" if logits is None else f"{tuple(logits.shape)}"
        raise EvaluationError(
            f"{type(model).__name__}: the loss of tokens needs logits for each label, of shape {tuple(labels.shape)} "
            f"and the vocabulary; got {found}: evaluate this model with its own Trainer"
        )
    if shifted is None and not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    sums = [_sum_row(row_TV, labels_T) for row_TV, labels_T in zip(logits, labels, strict=True)]
    return torch.stack([torch.stack(sums), (labels != NO_LABEL).sum(1).float()], dim=1)


def _sum_row(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    chunks = zip(logits_TV.split(_CHUNK), labels_T.split(_CHUNK), strict=True)
    losses = [F.cross_entropy(part.float(), wanted, ignore_index=NO_LABEL, reduction="sum") for part, wanted in chunks]
    return torch.stack(losses).sum()
