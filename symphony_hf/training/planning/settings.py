"""Training settings and sequence counts of a recipe, with the defaults of TrainingArguments or TRL's SFTConfig."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from symphony_hf.data.prepare import prepare_data
from symphony_hf.errors import ConfigError
from symphony_hf.recipe import Recipe
from symphony_hf.settings import check_least, check_names, convert_settings
from symphony_hf.training.arguments import missing_package
from symphony_hf.training.processors import load_processor

_READ = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("optim", "fp16", "bf16", "label_smoothing_factor", "loss_type"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),  # their older names
}
"""Settings that a plan depends on."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a recipe's train section that a plan depends on.

    Attributes:
        micro_batch: Number of sequences in one forward on one device.
        accumulation: Number of forwards per optimizer step.
        checkpointing: Whether activations are recomputed in the backward pass.
        every_n_layers: Distance between the layers whose activations are recomputed.
        label_smoothing: Label smoothing, for which Trainer needs all logits.
        optimizer: Name of the optimizer in TrainingArguments.
        half: Dtype of mixed precision; None for full precision.
        max_steps: Number of optimizer steps; if not positive, `epochs` decides.
        epochs: Number of passes over the data.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool
    every_n_layers: int
    label_smoothing: float
    optimizer: str
    half: torch.dtype | None
    max_steps: int
    epochs: float


def read_settings(recipe: Recipe) -> TrainSettings:
    """Read a recipe's train section, without the devices and packages that training itself needs.

    Raises:
        ConfigError: If a setting is unknown, has a value that training refuses, or cannot be planned.
    """
    kind: Any = TrainingArguments
    if recipe.data.kind == "chat":
        if (missing := missing_package("trl")) is not None:
            raise ConfigError(missing)
        from trl import SFTConfig

        kind = SFTConfig
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    train = check_names(recipe.train, defaults, "train")
    values = defaults | convert_settings(kind, {name: train[name] for name in _READ & train.keys()}, "train")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        check_least("train", 1, **{name: values[name]})
    checkpointing, of_checkpointing = (
        next((value for what in ("activation", "gradient") if (value := values.get(f"{what}_{end}")) is not None), None)
        for end in ("checkpointing", "checkpointing_kwargs")
    )
    half = torch.float16 if values["fp16"] else torch.bfloat16 if values["bf16"] else None
    if values["bf16"] is None and half is None:
        half = torch.bfloat16  # TRL's default
    return TrainSettings(
        micro_batch=values["per_device_train_batch_size"],
        accumulation=values["gradient_accumulation_steps"],
        checkpointing=bool(checkpointing),
        every_n_layers=_every_n_layers(of_checkpointing or {}) if checkpointing else 1,
        # TRL's other losses do without it.
        label_smoothing=values["label_smoothing_factor"] if values.get("loss_type", "nll") == "nll" else 0.0,
        optimizer=str(getattr(values["optim"], "value", values["optim"])),
        half=half,
        max_steps=values["max_steps"],
        epochs=values["num_train_epochs"],
    )


def _every_n_layers(settings: Any) -> int:
    where = "train: settings of checkpointing"
    settings = json.loads(settings) if isinstance(settings, str) else settings  # as TrainingArguments takes them
    for name, value in check_names(settings, None, where).items():
        if name != "every_n_layers" and (name, value) != ("use_reentrant", False):
            raise ConfigError(f"{where}: `{name}: {value}` cannot be planned: leave it out")
    every_n_layers = settings.get("every_n_layers", 1)
    if type(every_n_layers) is not int or every_n_layers < 1:
        raise ConfigError(f"{where}: `every_n_layers` must be an integer of at least 1, got {every_n_layers!r}")
    return every_n_layers


GLUE_EXAMPLES = {
    "cola": 8_551,
    "mnli": 392_702,
    "mrpc": 3_668,
    "qnli": 104_743,
    "qqp": 363_846,
    "rte": 2_490,
    "sst2": 67_349,
    "wnli": 635,
}
"""Sizes of the training splits, as published by GLUE."""


def sequences_of_data(recipe: Recipe) -> int | None:
    """Count the sequences of one epoch. Returns None if the data or the tokenizer is not available locally.

    Raises:
        DataError: If local data does not have the format of the recipe's kind.
    """
    data, source = recipe.data, recipe.model.tokenizer or recipe.model.path
    if data.kind == "glue" and data.path is None and data.name in GLUE_EXAMPLES:
        count = GLUE_EXAMPLES[data.name]
        return count if data.limit is None else min(count, data.limit)
    data_is_here = data.path in (None, "embedded") or Path(str(data.path)).expanduser().exists()
    tokenizer_is_here = source is None or Path(source).expanduser().exists()
    if not data_is_here or not tokenizer_is_here or data.streaming:
        return None
    prepared = prepare_data(data, load_processor(recipe), seed=0, train=recipe.train)
    if data.kind == "chat" and data.packing:  # TRL packs during training
        return None if prepared.num_tokens is None else -(-prepared.num_tokens // data.block_size)
    return len(prepared.train)


def sequences_of_run(settings: TrainSettings, processes: int, of_data: int | None) -> int | None:
    """Count the sequences of a run over all epochs and devices; None if it depends on data of unknown size."""
    if settings.max_steps > 0:
        return settings.max_steps * settings.micro_batch * settings.accumulation * processes
    return None if of_data is None else round(settings.epochs * of_data)
