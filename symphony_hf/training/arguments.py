"""TrainingArguments of a recipe, and checks for missing packages and devices."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from symphony_hf.data.packing import check_packed_batches
from symphony_hf.errors import ConfigError
from symphony_hf.recipe import Recipe
from symphony_hf.settings import parse_settings

from .damage import damage_of

_TRACKERS = ("tensorboard", "wandb", "trackio")


def training_arguments(recipe: Recipe, not_checked: list[str] | None = None) -> TrainingArguments:
    """Return TrainingArguments for a recipe's train section; TRL's SFTConfig for conversations.

    Args:
        recipe: Recipe, from `load_recipe`.
        not_checked: For a dry run: what this machine lacks is added to it, and not refused.

    Raises:
        ConfigError: If a setting is unknown or belongs elsewhere, TrainingArguments refuses a value, the data cannot be
            read with it, or a package or device that the recipe needs is missing.
    """
    if "output_dir" in recipe.train:
        raise ConfigError(
            f"train: `output_dir: {recipe.train['output_dir']}`: in a recipe, `output.directory` sets it: change that, "
            "or give `--output.directory`"
        )
    problems = [*_missing_packages(recipe), *_missing_devices(recipe)]
    if problems and not_checked is None:
        raise ConfigError(problems[0])
    # Trainer also accepts True for it, which TrainingArguments' type does not.
    settings = {name: value for name, value in recipe.train.items() if name != "resume_from_checkpoint"}
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if settings.get(name) is False:
            settings[name] = "no"  # YAML reads `no` as False
    if not_checked is not None:
        not_checked += problems
        settings = _settings_anywhere(settings, not_checked)
    fixed: dict[str, Any] = {"output_dir": str(Path(recipe.output.directory)), "report_to": "none"}
    kind: type[TrainingArguments] = TrainingArguments
    if recipe.data.kind == "chat" and (not_checked is None or _is_installed("trl")):
        from trl import SFTConfig

        kind = SFTConfig
        fixed |= {"max_length": recipe.data.block_size, "packing": recipe.data.packing}
    elif recipe.data.kind == "llava":
        fixed |= {"remove_unused_columns": False}  # the collator creates the inputs of the model
    if settings.get("eval_strategy", "no") != "no":
        fixed |= {
            "metric_for_best_model": "loss"
        }  # otherwise Trainer tracks no best checkpoint, and deletes it as an old one
    arguments = parse_settings(kind, settings, "train", **fixed)
    _check_data(recipe, arguments)
    arguments.resume_from_checkpoint = recipe.train.get("resume_from_checkpoint")
    return arguments


def _check_data(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Refuse training arguments with which the data could not be read, or would be other data."""
    if recipe.data.streaming and arguments.max_steps <= 0:
        raise ConfigError("train: a stream has no known length: set `max_steps`, or remove `data.streaming`")
    if damage_of(recipe) is not None and arguments.dataloader_persistent_workers:
        raise ConfigError(
            "train: dataloader_persistent_workers keeps the workers of the first epoch, and with `data.damage` they "
            "would repeat its damage in every epoch: leave it out"
        )
    if recipe.data.packing:
        check_packed_batches(recipe.model.attention, **packed_rows(recipe, arguments))


def packed_rows(recipe: Recipe, arguments: TrainingArguments) -> dict[str, int]:
    """Return the number of packed rows of each kind of batch, by the setting that it is from.

    There are none for `chat`, of which TRL makes one row of each batch.
    """
    if recipe.data.kind != "text":
        return {}
    evaluated = ["per_device_eval_batch_size"] if arguments.eval_strategy.value != "no" else []
    return {name: getattr(arguments, name) for name in ("per_device_train_batch_size", *evaluated)}


def _settings_anywhere(settings: dict[str, Any], not_checked: list[str]) -> dict[str, Any]:
    """Return the settings that TrainingArguments accepts on any machine, and list those that it would not."""
    dropped = {"trl": set(settings) - {field.name for field in dataclasses.fields(TrainingArguments)}}
    dropped["deepspeed"] = {"deepspeed"}
    unknown = {name for package, names in dropped.items() if not _is_installed(package) for name in names}
    if not torch.accelerator.is_available() and not settings.get("use_cpu"):
        unknown |= {"fp16", "fp16_full_eval", "tf32"}
        settings = settings | {"use_cpu": True}
        not_checked.append("whether the run fits on a GPU, and its precision there (no GPU here)")
    skipped = [name for name in settings if name in unknown]
    if skipped:
        not_checked.append(f"train: {', '.join(f'`{name}`' for name in skipped)}")
    return {name: value for name, value in settings.items() if name not in unknown}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _missing_packages(recipe: Recipe) -> Iterator[str]:
    """Yield missing packages before anything is loaded: the libraries check at first use, minutes later."""
    optimizer, report_to = str(recipe.train.get("optim", "")), recipe.train.get("report_to") or []
    needs = {
        "bitsandbytes": recipe.model.quantization is not None or "8bit" in optimizer or "paged" in optimizer,
        "deepspeed": _asks_for_deepspeed(recipe),
        "trl": recipe.data.kind == "chat",
        **{tracker: tracker in ([report_to] if isinstance(report_to, str) else report_to) for tracker in _TRACKERS},
    }
    yield from (missing for package, needed in needs.items() if needed and (missing := missing_package(package)))


def missing_package(package: str) -> str | None:
    """Return the error message for a package that is not installed; None if it is."""
    if _is_installed(package):
        return None
    extra = "tracking" if package in _TRACKERS else package
    return f"this recipe needs {package}, which is not installed: pip install 'symphony-hf[{extra}]'"


def _asks_for_deepspeed(recipe: Recipe) -> bool:
    by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    by_launch = (recipe.launch.strategy or "").startswith("zero")
    return by_launcher or by_launch or bool(recipe.train.get("deepspeed"))


def _missing_devices(recipe: Recipe) -> Iterator[str]:
    """Yield settings that need a GPU on a machine without one, and more processes than GPUs."""
    on_gpu = torch.accelerator.is_available() and not recipe.train.get("use_cpu")
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu and num_here > torch.accelerator.device_count():
        yield (
            f"launch: {num_here} processes were started on a machine with {torch.accelerator.device_count()} GPUs, and "
            "each process needs its own: lower `--num_processes`"
        )
    if not on_gpu and not recipe.train.get("use_cpu") and _is_for_a_gpu():
        yield (
            "launch: the launcher's configuration is for a GPU, and there is none here: launch with "
            "recipes/accelerate/cpu.yaml, or set `use_cpu: true` in the train section"
        )
    if not on_gpu and recipe.train.get("fp16"):
        yield "train: `fp16` needs a GPU: set `fp16: false`, or `bf16: true`"
    if not on_gpu and "flash" in (recipe.model.attention or ""):
        yield (f"model: attention `{recipe.model.attention}` needs a GPU: use `sdpa`, or leave it out")


def _is_for_a_gpu() -> bool:
    """Whether accelerate launched this process with a GPU configuration such as `single_gpu.yaml`."""
    use_cpu, precision = (os.environ.get(f"ACCELERATE_{name}", "").lower() for name in ("USE_CPU", "MIXED_PRECISION"))
    return use_cpu == "false" and precision in ("bf16", "fp16", "fp8")
