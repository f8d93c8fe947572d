"""A Trainer whose runs can be killed at any moment and resumed exactly."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from symphony_hf.conversion.adapters.loading import restore_adapter
from symphony_hf.errors import CheckpointError
from symphony_hf.files import ADAPTER_RECORD, UNFINISHED, finish, place_to_write, read_weight_map

from .resuming import batches_of
from .token_loss import TokenLossTrainer
from .trainer_checkpoints import delete_oldest, finish_checkpoint, reporting_failed_save, run_number, run_of

logger = logging.get_logger(__name__)


class ResumableTrainer(TokenLossTrainer):
    """transformers' Trainer, with checkpoints that get their name only once they are complete.

    A checkpoint keeps the model's own tensor names: Trainer loads it without the conversion from the Hub's, and so
    silently loses the experts of Mixtral, OLMoE and others. Losses are logged before each checkpoint, so that no
    average spans it. An older checkpoint is deleted only after the newer one is complete, and if it is of this run.

    Raises:
        CheckpointError: During training, if a checkpoint cannot be written, or does not fit the model.
    """

    run_settings: Mapping[str, Any] | None = None
    """Settings of the run, for the record of each checkpoint."""

    resumed_at = 0
    """Step of the checkpoint that the run resumed from."""

    started: float | None = None
    """Time by `time.perf_counter` since which the seconds in each checkpoint's record count; none are if None."""

    _writing = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flow = ResumableFlow()
        self.add_callback(self._flow)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, from the beginning or from a path, as a run of its own or the one that is resumed."""
        resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._flow.run = run_number(Path(self.args.output_dir), resumed)
        if resumed is not None:
            self.resumed_at = json.loads((resumed / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._writing else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self._get_output_dir(trial))
        target = output / f"checkpoint-{self.state.global_step}"
        with reporting_failed_save(target):
            self._write_checkpoint(model, trial)
            self._note_best(output, target)
            self.accelerator.wait_for_everyone()  # each process writes its own files
            if self.args.should_save:
                run = self._flow.run
                seconds = None if self.started is None else time.perf_counter() - self.started
                finish_checkpoint(
                    target, self.state.global_step, batches_of(self.args), self.run_settings, run, seconds
                )
                newest_and_best = {target, Path(self.state.best_model_checkpoint or target)}
                delete_oldest(output, self.args.save_total_limit, newest_and_best, run)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._writing = True
        try:
            with _own_tensor_names(unwrapped):
                super()._save_checkpoint(model, trial)
        finally:
            self._writing = False

    def _note_best(self, output: Path, target: Path) -> None:
        """Note the best checkpoint. Trainer looks for that of the best evaluation, at which nothing may be saved."""
        best = _best_checkpoint(output, self.args, self.state, self._flow.run, target)
        self.state.best_model_checkpoint = None if best is None else str(best)
        if self.args.should_save:
            self.state.save_to_json(str(place_to_write(target) / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:  # it is pushed from its final folder
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        target = self.model if model is None else model
        try:
            if isinstance(target, PreTrainedModel) and _has_other_names(folder, target):
                logger.warning(
                    f"{folder} has the tensor names of the Hub, and Trainer would skip those that the model names "
                    "differently, such as its experts: loading it with from_pretrained"
                )
                _load_converted(folder, target)
            elif (folder / ADAPTER_RECORD).exists():
                restore_adapter(target, folder)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            first = [line.strip() for line in str(error).splitlines()[1:]][:1]
            raise CheckpointError(f"`{folder}` is of another model than the recipe's: {' '.join(first)}") from error

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if (folder / ADAPTER_RECORD).exists() and not is_sharded:
            restore_adapter(self.model, folder)
        else:
            super()._load_best_model()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return no batches after the last step: a Trainer that resumes there within an epoch would train one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        """Keep the limit from Trainer, which at 1 would delete every checkpoint but the best, of other runs too."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def save_final(self, target: Path, *others: Any) -> None:
        """Save the trained model, and other objects with a `save_pretrained`, to a folder that appears at once.

        Raises:
            CheckpointError: If it cannot be written.
        """
        written = place_to_write(target)
        with reporting_failed_save(target):
            self.save_model(str(written))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for other in others:
                    other.save_pretrained(written)
                (written / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that is not needed for loading
                finish(target)
            self.accelerator.wait_for_everyone()

    def mean_loss(self) -> float | None:
        """Return the mean loss over all steps, including those before a resume; None if a step was not logged.

        Trainer's own `train_loss` covers only the steps after the resume, and transformers 5.17 divides even that by
        the steps of the whole run.
        """
        total, last = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last)
                last = entry["step"]
        return total / last if last and last == self.state.global_step else None


@functools.cache
def resumable_sft_trainer() -> type[ResumableTrainer]:
    """Return a class with TRL's SFTTrainer between ResumableTrainer and Trainer in its method resolution order."""
    from trl import SFTTrainer

    return type("ResumableSFTTrainer", (ResumableTrainer, SFTTrainer), {"__module__": __name__})


class ResumableFlow(TrainerCallback):
    """Callback that makes Trainer's control flow resumable.

    Losses are logged before each checkpoint, since the running sums of Trainer are not saved. A run that resumes from
    its last step ends at once. A run that was killed after it had completed a checkpoint, and before it had deleted
    older ones, deletes them when it resumes.
    """

    run = 0
    """Number of the run in its folder."""

    def __init__(self) -> None:
        self._stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepped = False
        output = Path(args.output_dir)
        best = _best_checkpoint(output, args, state, self.run)
        if best is not None:  # Trainer has forgotten its path if the folder was moved
            state.best_model_checkpoint = str(best)
        if args.should_save:
            newest = output / f"checkpoint-{state.global_step}"
            delete_oldest(output, args.save_total_limit, {newest, best or newest}, self.run)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stepped = True
        self._log_before_save(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._stepped and state.global_step >= state.max_steps:
            control.should_training_stop = True
            control.should_save = control.should_evaluate = control.should_log = False  # already done
        self._log_before_save(args, control)

    def _log_before_save(self, args: TrainingArguments, control: TrainerControl) -> None:
        may_save = control.should_save or (args.save_strategy == "best" and control.should_evaluate)
        if may_save and args.logging_strategy != "no":
            control.should_log = True


def _best_checkpoint(
    output: Path, args: TrainingArguments, state: TrainerState, run: int, target: Path | None = None
) -> Path | None:
    """Return the checkpoint of a run with the best evaluation at its own step, and the first of equals.

    Args:
        output: Folder of the checkpoints.
        args: Training arguments, with the metric.
        state: State of the run, with its evaluations.
        run: Number of the run.
        target: Checkpoint that is being written.
    """
    name, values = args.metric_for_best_model, {}
    if name is not None:
        name = name if name.startswith("eval_") else f"eval_{name}"
        values = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
    folders = {output / f"checkpoint-{step}": value for step, value in values.items() if not math.isnan(value)}
    saved = [folder for folder in folders if folder == target or run_of(folder) == run]
    return (max if args.greater_is_better else min)(saved, key=folders.__getitem__, default=None)


@contextlib.contextmanager
def _own_tensor_names(model: Any) -> Iterator[None]:
    """Save a model under its own tensor names, without the conversion to those of the Hub."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    replaced = model.__dict__.get("save_pretrained")
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained
        if replaced is not None:
            model.save_pretrained = replaced  # type: ignore[method-assign]


def _has_other_names(folder: Path, model: PreTrainedModel) -> bool:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = set(read_weight_map(index, CheckpointError))
    elif single.exists():
        with safe_open(single, "pt") as file:
            names = set(file.keys())
    else:
        return False
    return not names <= set(model.state_dict())


def _load_converted(folder: Path, model: PreTrainedModel) -> None:
    loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if lost:
        raise CheckpointError(f"`{folder}` is of another model than the recipe's: {', '.join(lost[:3])} do not match")
    model.load_state_dict(loaded.state_dict())
