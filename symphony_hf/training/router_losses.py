"""Router losses for trainers that compute their own loss: DPO, KTO, GRPO, reward modelling, label smoothing."""

import functools
from typing import Any, TypeVar

from torch import Tensor
from transformers import Trainer

from symphony_hf.errors import ConfigError
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.symphonize import is_symphonized

TrainerClass = TypeVar("TrainerClass", bound=type[Trainer])


def with_router_losses(trainer_class: TrainerClass) -> TrainerClass:
    """Return a trainer class whose loss starts the balance and z-loss, whatever the loss is computed from.

    A Trainer that lets the model compute the loss from `labels` needs nothing: the losses are tied to it already, and
    this class leaves it at that. Trainers that make their loss of logits or log-probabilities, as TRL's for DPO, KTO,
    GRPO and reward models do, and Trainer with `label_smoothing_factor`, do need it:

        trainer = with_router_losses(DPOTrainer)(model, args=..., callbacks=[SymphonyCallback()])

    Args:
        trainer_class: A class with the `compute_loss` of transformers' Trainer.

    Returns:
        A subclass with the same name. For a model that is not symphonized it behaves like the given class.

    Raises:
        ConfigError: If the class has no `compute_loss`.
    """
    if not isinstance(trainer_class, type) or not hasattr(trainer_class, "compute_loss"):
        raise ConfigError(
            f"with_router_losses: expected a trainer class with a `compute_loss`, got {trainer_class!r}: give the "
            "class, as in `with_router_losses(DPOTrainer)(model, ...)`"
        )

    @functools.wraps(trainer_class.compute_loss)
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = trainer_class.compute_loss(self, model, inputs, return_outputs=return_outputs, **kwargs)
        loss = result[0] if return_outputs else result
        loss = _record(model, loss)
        return (loss, *result[1:]) if return_outputs else loss

    namespace = {"compute_loss": compute_loss, "__module__": trainer_class.__module__, "__doc__": trainer_class.__doc__}
    return type(trainer_class.__name__, (trainer_class,), namespace)  # type: ignore[return-value]


def _record(model: Any, loss: Tensor) -> Tensor:
    if not is_symphonized(model):
        return loss
    tracker = tracker_of(model)
    # In a forward that recorded its own loss, these losses start there: once more would double them.
    is_recorded = tracker.state.recorded_in_forward
    return tracker.record_loss(loss) if model.training and not is_recorded else loss
