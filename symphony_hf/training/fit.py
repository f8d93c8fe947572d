"""The Trainer of every recipe, with its callbacks and progress bar."""

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
from .launch import Request, check_launch, strategy_of
from .precision import keep_steps_precise
from .router_losses import with_router_losses
from .trainer import ResumableTrainer, resumable_sft_trainer

_SHOWN = {"loss": "loss", "eval_loss": "validation", "symphony/balance_loss": "balance"}


class StepProgress(ProgressCallback):
    """Trainer's progress bar, without a printed dictionary at each log and a second bar at each evaluation."""

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
        """Show no bar for evaluations."""


def train(
    model: PreTrainedModel,
    train_data: Any,
    validation_data: Any,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    resume_from: Path | None = None,
    requested: Sequence[Request] = (),
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    processor: Any = None,
    settings: Mapping[str, Any] | None = None,
    started: float | None = None,
) -> ResumableTrainer:
    """Train a model with transformers' Trainer, or with TRL's SFTTrainer. Symphony models get `SymphonyCallback`.

    Args:
        model: Model, symphonized or not, with or without adapters.
        train_data: Training examples; conversations for SFTTrainer.
        validation_data: Validation examples; None for no evaluation during training.
        arguments: Training arguments. TRL's SFTConfig selects SFTTrainer.
        callbacks: Further callbacks.
        resume_from: Complete checkpoint to resume from.
        requested: Requested launch, compared with the one that the Trainer runs.
        collator: Function that makes a batch of examples; transformers' default if None.
        processor: Tokenizer or processor of the model, for SFTTrainer.
        settings: Settings of the run to record in each checkpoint.
        started: Time by `time.perf_counter` since which the seconds in each checkpoint's record count. None if it is
            unknown: then checkpoints record none.

    Raises:
        ConfigError: If another launch runs than was requested.
        CheckpointError: If a checkpoint cannot be written, or `resume_from` belongs to another model.
    """
    ours = [SymphonyCallback(), *(callbacks or [])] if is_symphonized(model) else callbacks
    is_sft = any(kind.__name__ == "SFTConfig" for kind in type(arguments).__mro__)
    trainer = with_router_losses(resumable_sft_trainer() if is_sft else ResumableTrainer)(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=validation_data,
        data_collator=collator,
        processing_class=processor if is_sft else None,
        callbacks=ours,
    )
    trainer.run_settings = settings
    trainer.started = started
    strategy = strategy_of(trainer.accelerator.state)
    check_launch(requested, trainer.accelerator.num_processes, strategy)
    keep_steps_precise(trainer, strategy)
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        trainer.add_callback(StepProgress())
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer
