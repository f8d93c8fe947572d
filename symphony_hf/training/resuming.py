"""The checkpoint that a run resumes from: one that every process finds, compared with the run that resumes."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from symphony_hf.errors import CheckpointError, ConfigError
from symphony_hf.files import CONFIG

from .launch import expected_strategy
from .trainer_checkpoints import clear_leftovers, find_checkpoint, read_record


def batches_of(arguments: TrainingArguments) -> dict[str, int]:
    """Return what makes the batches of a step."""
    settings = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return {"processes": arguments.world_size, **{name: getattr(arguments, name) for name in settings}}


def checkpoint_to_resume(arguments: TrainingArguments) -> Path | None:
    """Find and print the checkpoint that `resume_from_checkpoint` means, after clearing leftovers of a killed save.

    Every process calls this, with the same result.

    Raises:
        ConfigError: If the setting is neither true, false nor a path, or the processes find different checkpoints.
        CheckpointError: If the checkpoint at the path is not complete, or DeepSpeed cannot resume from it.
    """
    output = Path(arguments.output_dir)
    with arguments.main_process_first(local=arguments.save_on_each_node, desc="clearing unfinished checkpoints"):
        removed = clear_leftovers(output) if arguments.should_save else []
    folder, notes = find_checkpoint(output, arguments.resume_from_checkpoint)
    _check_same_on_all_processes(folder)
    if removed:
        notes.insert(0, f"removed unfinished folders of an earlier run from `{output}`: {', '.join(removed)}")
    record, now = (read_record(folder) if folder is not None else None) or {}, batches_of(arguments)
    differing = [f"{name} {record[name]}, now {now[name]}" for name in now if record.get(name, now[name]) != now[name]]
    if differing:
        notes.append(
            f"it was saved with other batches ({', '.join(differing)}): Trainer resumes at the step number, so some of "
            "the epoch's data may be skipped or repeated"
        )
    if folder is not None and arguments.device.type == "cpu":
        _restore_numbered_cpus()
    if folder is not None and not any(folder.glob("rng_state*")):
        if expected_strategy(arguments).startswith("zero"):
            anew = ", or start a new run with `model.path` set to it and `model.tokenizer` to this run's tokenizer"
            raise CheckpointError(
                f"train: resume_from_checkpoint: `{folder}` has only weights (save_only_model), and DeepSpeed resumes "
                f"from its own states alone: give another checkpoint{anew if (folder / CONFIG).is_file() else ''}"
            )
        notes.append("it has only weights (save_only_model): the optimizer and the random states start anew")
    print_notes(arguments, notes)
    return folder


def print_notes(arguments: TrainingArguments, notes: list[str]) -> None:
    """Print notes on a run, on the first process alone."""
    if arguments.process_index == 0:
        for note in notes:
            print(f"symphony_hf: {note}", flush=True)


def _check_same_on_all_processes(folder: Path | None) -> None:
    from accelerate.utils import gather_object

    found = sorted(set(gather_object(["none" if folder is None else folder.name])))
    if len(found) > 1:
        raise ConfigError(
            f"train: resume_from_checkpoint: the processes found different checkpoints ({', '.join(found)}): put "
            "`output.directory` on a disk that all machines share, or copy the checkpoint to each of them and set "
            "`save_on_each_node: true`"
        )


@functools.cache
def _restore_numbered_cpus() -> None:
    """Let torch load tensors to `cpu:0`, which transformers 5.17 requests in runs of several processes."""

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(99, lambda storage: None, restore)
