"""Training settings and sequence counts of a recipe, with the defaults of TrainingArguments or TRL's SFTConfig."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from symphony_hf.data.prepare import prepare_data
from symphony_hf.errors import ConfigError, nearest
from symphony_hf.recipe import Recipe
from symphony_hf.training.processors import load_processor


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a recipe's train section that a plan depends on.

    Attributes:
        micro_batch: Number of sequences in one forward on one device.
        accumulation: Number of forwards per optimizer step.
        checkpointing: Whether activations are recomputed in the backward pass.
        optimizer: Name of the optimizer in TrainingArguments.
        half: Dtype of mixed precision; None for full precision.
        max_steps: Number of optimizer steps; if not positive, `epochs` decides.
        epochs: Number of passes over the data.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool
    optimizer: str
    half: torch.dtype | None
    max_steps: int
    epochs: float


def read_settings(recipe: Recipe) -> TrainSettings:
    """Read a recipe's train section, without the devices and packages that training itself needs.

    Raises:
        ConfigError: If a setting is unknown, or is not a number where it must be one.
    """
    kind: Any = TrainingArguments
    if recipe.data.kind == "chat":
        kind = _sft_config()
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name in recipe.train:
        if name not in defaults:
            raise ConfigError(f"train: unknown setting `{name}`; {nearest(name, defaults)}")
    values = {**defaults, **recipe.train}
    checkpointing = [values.get(f"{what}_checkpointing") for what in ("activation", "gradient")]
    half = torch.float16 if values["fp16"] else torch.bfloat16 if values["bf16"] else None
    if values["bf16"] is None and half is None:
        half = torch.bfloat16  # TRL's default
    return TrainSettings(
        micro_batch=_positive(values, "per_device_train_batch_size"),
        accumulation=_positive(values, "gradient_accumulation_steps"),
        checkpointing=bool(next((value for value in checkpointing if value is not None), False)),
        optimizer=str(getattr(values["optim"], "value", values["optim"])),
        half=half,
        max_steps=int(values["max_steps"]),
        epochs=float(values["num_train_epochs"]),
    )


def _sft_config() -> type:
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise ConfigError("this recipe needs trl, which is not installed: pip install 'symphony-hf[trl]'") from error
    return SFTConfig


def _positive(values: dict[str, Any], name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"train: `{name}` must be an integer of at least 1, got {value!r}")
    return value


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
