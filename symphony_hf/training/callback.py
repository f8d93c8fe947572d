"""SymphonyCallback for transformers' Trainer: updates the graphs at each optimizer step and logs the router losses."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from symphony_hf.conversion.adapters.trainable import print_trainable_parameters
from symphony_hf.errors import PatchError
from symphony_hf.patching.attachment import record_log_probs, tracker_of
from symphony_hf.patching.expert_graph import is_adapted
from symphony_hf.patching.symphonize import symphony_routers
from symphony_hf.patching.training_checks import LOSES_COUNTS
from symphony_hf.patching.training_state import parameters_of

from .launch import check_launch_of_trainer
from .reference_model import mix_graphs, synced_reference


def add_to_log(
    values: Mapping[str, float], logs: dict[str, Any], state: TrainerState, prefix: str = "symphony"
) -> None:
    """Add values to a log of Trainer and to its record of it, so that later callbacks see them."""
    named = {f"{prefix}/{name}": value for name, value in values.items()}
    logs.update(named)
    if state.log_history:
        state.log_history[-1].update(named)


def move_to_front(callback: TrainerCallback) -> list[TrainerCallback]:
    """Put a callback before the reporting ones, which Trainer calls before those of a user, and return all of them.

    Trainer does not give a callback its list, so the list is taken from the event that is under way. That goes on with
    the next callback: those before this one move up by one, and were called.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    callbacks = [] if frame is None else frame.f_locals["self"].callbacks
    if callback in callbacks:
        callbacks.remove(callback)
        callbacks.insert(0, callback)
    return callbacks


def saved_attributes(callback: TrainerCallback, state: TrainerState) -> dict[str, Any]:
    """Return the attributes of a callback's `state()` in the checkpoint that is resumed; none at the start of a run.

    Trainer restores them itself only where `restore_callback_states_from_checkpoint` is set. Where the checkpoint is of
    a run without this callback, its entry is added, since Trainer saves to entries that exist.
    """
    stored: Any = state.stateful_callbacks
    found = stored.setdefault(type(callback).__name__, {})
    own = found[-1] if isinstance(found, list) and found else found
    return own.get("attributes", {}) if state.global_step and own else {}


def refuse_vllm(args: Any, tracker: Any, call: str) -> None:
    """Refuse completions of TRL's vLLM from a model that routes by graphs or moved biases: TRL sends parameters alone.

    Raises:
        PatchError: If that is what the arguments ask for.
    """
    if getattr(args, "use_vllm", False) and (tracker.config.strength != 0 or tracker.config.balance == "bias"):
        raise PatchError(
            f"{call}: use_vllm=True samples completions without the graphs, and without the correction biases that "
            "balance='bias' moves, since TRL sends vLLM parameters and no buffers: set use_vllm=False, or symphonize "
            "with strength=0 and balance='loss'"
        )


class SymphonyCallback(TrainerCallback, ExportableState):
    """Callback for any Trainer with a symphonized model: `Trainer(model, ..., callbacks=[SymphonyCallback()])`.

    Without it, the graphs are updated at the first forward or save after each optimizer step. On several ranks, the
    update of the last step is missing then. With `balance_scope="last_step"`, the load of the last step is saved in
    each checkpoint's trainer_state.json, so that a resumed run goes on exactly.

    Raises:
        PatchError: At the start of training, if the model is not symphonized, would run under DataParallel, or would
            sample in vLLM.
        ConfigError: At the start of training, if accelerate runs fewer processes or another strategy than requested.
    """

    _reference: Any = None
    _tracker: Any = None

    def state(self) -> dict[str, Any]:
        """Return what Trainer saves of this callback in a checkpoint."""
        loads = {} if self._tracker is None else self._tracker.state.saved_loads()
        return {"args": {}, "attributes": {"last_loads": loads}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        beside, tracker = move_to_front(self), tracker_of(model)
        if args.n_gpu > 1:
            raise PatchError(f"SymphonyCallback: {args.n_gpu} GPUs in one process (DataParallel) {LOSES_COUNTS}")
        # TRL's own balance loss is off, since the model's weight for it is 0, unless TRL's arguments set one.
        if tracker.config.balances and getattr(args, "router_aux_loss_coef", None):
            raise PatchError(
                f"SymphonyCallback: router_aux_loss_coef={args.router_aux_loss_coef} would add TRL's balance loss to "
                "this one: leave it out, or symphonize with balance_loss_weight=0"
            )
        refuse_vllm(args, tracker, "SymphonyCallback")
        check_launch_of_trainer(args)
        self._reference = synced_reference(beside, args, model)
        self._tracker = tracker
        tracker.settle_alone()
        tracker.state.begin_training()
        tracker.state.restore_loads(saved_attributes(self, state).get("last_loads", {}))
        tracker.remove_log_probs_hook()  # left by a training that was interrupted
        # SFTTrainer computes its loss from the tokens' log-probabilities. With `dft` it weights them.
        if any(kind.__name__ == "SFTConfig" for kind in type(args).__mro__) and args.loss_type == "nll":
            tracker.log_probs_hook = model.register_forward_hook(record_log_probs)
        tracker.state.optimizer_parameters = parameters_of(kwargs.get("optimizer"))
        tracker.checks.check_optimizers(tracker.state, list(symphony_routers(model)), model.parameters())
        if is_adapted(model) and state.is_world_process_zero:
            print_trainable_parameters(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        tracker_of(model).commit()
        if self._reference is not None:
            mix_graphs(args, state, model, self._reference)

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
            return  # an evaluation's entry, or the summary at the end
        tracker = tracker_of(model)
        tracker.checks.warn_about_skipped()
        add_to_log(tracker.state.take_losses(), logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        tracker_of(model).remove_log_probs_hook()
