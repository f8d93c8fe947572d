"""Router losses for trainers that compute their own loss: DPO, KTO, GRPO, reward modelling, label smoothing."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor
from transformers import Trainer

from symphony_hf.errors import ConfigError, PatchError
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.recorded_loss import loss_shifts_labels, share_of_step
from symphony_hf.patching.symphonize import is_symphonized

TrainerClass = TypeVar("TrainerClass", bound=type[Trainer])


def with_router_losses(trainer_class: TrainerClass) -> TrainerClass:
    """Return a trainer class that adds the balance and z-loss to the loss from its `compute_loss`.

    Trainers that let the model compute the loss from `labels` do not need it, and keep their results with it. Trainers
    that compute a loss from logits or log-probabilities do: TRL's for DPO, KTO, GRPO and reward models, and Trainer
    with `label_smoothing_factor`.

        trainer = with_router_losses(DPOTrainer)(model, args=..., callbacks=[SymphonyCallback()])

    Args:
        trainer_class: Subclass of transformers' Trainer.

    Returns:
        A subclass with the same name. A model that is not symphonized trains as with the given class.

    Raises:
        ConfigError: If it is not a subclass of Trainer.
        PatchError: In the first training step, if the class computes its loss elsewhere.
    """
    if not isinstance(trainer_class, type) or not issubclass(trainer_class, Trainer):
        raise ConfigError(
            f"with_router_losses: expected a trainer class (a subclass of Trainer), got {trainer_class!r}: "
            "give the class, as in `with_router_losses(DPOTrainer)(model, ...)`"
        )

    @functools.wraps(trainer_class.compute_loss)
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self._has_computed_loss = True
        labels = _counted_labels(self, inputs)  # Trainer takes them out of the inputs for label smoothing
        is_trained = model.training and is_symphonized(model)
        if is_trained:
            tracker_of(model).state.recorded_in_forward = False  # a loss of the model's parts begins no forward of it
        result = trainer_class.compute_loss(self, model, inputs, return_outputs=return_outputs, **kwargs)
        if not is_trained:
            return result
        loss, *outputs = result if return_outputs else (result,)
        tracker = tracker_of(model)
        if not tracker.state.recorded_in_forward:  # otherwise the model's own loss starts the router losses
            loss = tracker.record_loss(loss, _share_of_step(self, labels, kwargs.get("num_items_in_batch")))
        return (loss, *outputs) if return_outputs else loss

    @functools.wraps(trainer_class.training_step)
    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._has_computed_loss = False
        loss = trainer_class.training_step(self, model, *args, **kwargs)
        if not self._has_computed_loss and is_symphonized(model):
            raise PatchError(
                f"with_router_losses: {trainer_class.__name__} computes its loss in `training_step`, without "
                "`compute_loss`: call `symphony_hf.add_router_losses(model, loss)` there before backward, or set "
                "`balance_loss_weight` and `z_loss_weight` to 0 and use the class as it is"
            )
        return loss

    namespace = {
        "compute_loss": compute_loss,
        "training_step": training_step,
        "__module__": trainer_class.__module__,
        "__doc__": trainer_class.__doc__,
    }
    return type(trainer_class.__name__, (trainer_class,), namespace)  # type: ignore[return-value]


def _counted_labels(trainer: Trainer, inputs: Any) -> Tensor | None:
    """Return the labels of a micro-batch that Trainer counts in `num_items_in_batch`."""
    if not isinstance(inputs, Mapping):
        return None
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if shifted is not None or not isinstance(labels, Tensor):
        return shifted
    return labels[..., 1:] if loss_shifts_labels(trainer.model) else labels  # type: ignore[arg-type]


def _share_of_step(trainer: Trainer, labels: Tensor | None, num_items_in_batch: Any) -> Tensor | float:
    """Return this micro-batch's share of the optimizer step if `compute_loss` has applied it to the main loss.

    The conditions are those of `Trainer.training_step`, which otherwise divides all losses by the accumulation steps,
    and of `Trainer.compute_loss`, which divides by the tokens of all processes where it averages these.
    """
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # new in transformers 5.19
    if is_scaled is None:
        accepts_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_scaled = accepts_items or trainer.compute_loss_func is not None
        if is_scaled and num_items_in_batch is not None and labels is not None:
            is_mean = trainer.args.average_tokens_across_devices
            # Ranks of tensor parallelism have the same tokens, which Trainer counts once.
            copies = trainer.accelerator.num_processes // trainer.get_tp_size() if is_mean else 1
            return copies * share_of_step(labels, num_items_in_batch)
    steps = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    return 1 / steps if is_scaled else 1.0
