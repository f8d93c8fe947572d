"""One Trainer for every recipe: what is around the model while it trains."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from symphony_hf.patching.symphonize import is_symphonized

from .callback import SymphonyCallback
from .launch import Ask, check_launch, strategy_of
from .router_losses import with_router_losses
from .trainer import ResumableTrainer, resumable_sft_trainer

_SHOWN = {"loss": "loss", "eval_loss": "validation", "symphony/balance_loss": "balance"}


class StepProgress(ProgressCallback):
    """Trainer's own bar, without a printed dictionary at each log and a second bar at each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None:
            return
        values = {_SHOWN[name]: f"{value:.3f}" for name, value in (logs or {}).items() if name in _SHOWN}
        self._values.update(values)
        self.training_bar.set_postfix(self._values)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar: it is over before one could be read."""


def train(
    model: PreTrainedModel,
    train_data: Any,
    validation_data: Any,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    resume_from: Path | None = None,
    asked: Sequence[Ask] = (),
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    processor: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> ResumableTrainer:
    """Train a model with transformers' Trainer; a Symphony model's graphs move once per optimizer step.

    Progress is one bar that shows the last values, where Trainer would print a dictionary at each.

    Args:
        model: Symphonized or not, with adapters or without.
        train_data: Examples; conversations where `arguments` are TRL's.
        validation_data: Likewise; None for no evaluation while it trains.
        arguments: TrainingArguments; TRL's SFTConfig has TRL's SFTTrainer train.
        callbacks: More of them, called before the ones that report.
        resume_from: A whole checkpoint to go on from.
        asked: What must run, compared with what the Trainer made of it.
        collator: Makes a batch of examples; transformers' default when None.
        processor: The model's tokenizer or processor, for a Trainer that needs it.
        settings: Of the run, which each checkpoint keeps.

    Returns:
        The Trainer, after training.

    Raises:
        ConfigError: If something else runs than was asked for.
        CheckpointError: If a checkpoint cannot be written, or the one to go on from is of another model.
    """
    is_sft = any(kind.__name__ == "SFTConfig" for kind in type(arguments).__mro__)
    trainer = with_router_losses(resumable_sft_trainer() if is_sft else ResumableTrainer)(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=validation_data,
        data_collator=collator,
        processing_class=processor if is_sft else None,
    )
    trainer.run_settings = settings
    check_launch(asked, trainer.accelerator.num_processes, strategy_of(trainer.accelerator.state))
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        trainer.add_callback(StepProgress())
    ours = [SymphonyCallback(), *(callbacks or [])] if is_symphonized(model) else callbacks or []
    # In front of the reporting callbacks, so that they see what these add to the logs.
    trainer.callback_handler.callbacks[:0] = ours
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer
