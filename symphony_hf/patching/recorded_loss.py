"""A model's loss function, which also ties the router losses to the loss it returns."""

from typing import Any

from torch import Tensor, as_tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .graph_updates import Tracker


class RecordedLoss:
    """A loss function that also ties the router losses to the loss it returns.

    Args:
        original: The model's own loss function.
        own: The function set on the model itself, in whose place this one is; None where its class has it.
        tracker: The model's tracker.
        shifts_labels: Whether the labels move by one position before they are compared.
    """

    def __init__(self, original: Any, own: Any, tracker: Tracker, shifts_labels: bool) -> None:
        self.original = original
        self.own = own
        self.tracker = tracker
        self.shifts_labels = shifts_labels

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.tracker.in_training_forward:
            return self.original(*args, **kwargs)
        state = self.tracker.state
        before, state.recorded_in_forward = state.recorded_in_forward, False
        loss = self.original(*args, **kwargs)
        if state.recorded_in_forward:
            return loss  # by the function that was here before, which this one calls
        state.recorded_in_forward = before
        return self.tracker.record_loss(loss, self._share_of_step(*args, **kwargs))

    def _share_of_step(self, *args: Any, **kwargs: Any) -> Tensor | float:
        labels = kwargs.get("shift_labels")
        if labels is None and kwargs.get("num_items_in_batch") is not None:
            labels = kwargs["labels"] if "labels" in kwargs else args[1]
            labels = labels[..., 1:] if self.shifts_labels else labels
        return share_of_step(labels, kwargs.get("num_items_in_batch"))


def record_loss_function(model: PreTrainedModel, tracker: Tracker) -> None:
    """Wrap a model's loss function, unless it is wrapped. One that was set after `symphonize` is wrapped, too."""
    if getattr(model, "loss_type", None) is None:
        return
    own = model.__dict__.get("_loss_function")
    if isinstance(own, RecordedLoss) and own.tracker is tracker:
        return
    model.loss_function = RecordedLoss(model.loss_function, own, tracker, loss_shifts_labels(model))


def restore_loss_function(model: Any) -> None:
    """Undo `record_loss_function`."""
    recorded = model.__dict__.get("_loss_function")
    if isinstance(recorded, RecordedLoss):
        del model._loss_function
        if recorded.own is not None:
            model._loss_function = recorded.own


def loss_shifts_labels(model: PreTrainedModel) -> bool:
    """Whether `num_items_in_batch` leaves out each row's first label.

    This is Trainer's rule. It goes by the type of the model, whatever its loss function is.
    """
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(model.config, "is_encoder_decoder", False)


def share_of_step(labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
    """Return a micro-batch's share of the optimizer step's tokens, where its loss is divided by all of them.

    Trainer passes `num_items_in_batch` and then does not divide by the accumulation steps.

    Args:
        labels: What the loss is computed on, -100 where it is not.
        num_items: Number of labels in the step; None where the loss is a mean of its own.
    """
    if num_items is None or labels is None:
        return 1.0
    # A step without any label has no tokens to share: its cross-entropy has no gradient, and neither have these.
    return (labels != -100).sum() / as_tensor(num_items).clamp(min=1)
