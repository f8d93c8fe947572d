"""SymphonyCallback: moves the graphs once per optimizer step of transformers' Trainer, and logs the router losses."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..attachment import tracker_of
from ..errors import PatchError


class SymphonyCallback(TrainerCallback):
    """Give it to any Trainer whose model is symphonized: `Trainer(model, ..., callbacks=[SymphonyCallback()])`.

    Without it the graphs still move, once per micro-batch instead of once per optimizer step.

    Raises:
        PatchError: At the start of training, if the model is not symphonized, or would run under DataParallel.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        tracker = tracker_of(model)
        if args.n_gpu > 1:
            raise PatchError(
                f"SymphonyCallback: {args.n_gpu} GPUs in one process (DataParallel) lose all counts but one replica's: "
                "start one process a GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one"
            )
        tracker.driven = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        tracker_of(model).commit()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return  # an evaluation's record, or the summary at the end
        tracker = tracker_of(model)
        tracker.warn_about_skipped()
        values = {f"symphony/{name}": value for name, value in tracker.take_losses().items()}
        # Trainer made its record of this log before it called us: add to both, so that every callback after us sees it.
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        tracker_of(model).driven = False
