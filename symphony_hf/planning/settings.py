"""What a plan needs of a recipe's train section, with the defaults of the library that will train."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import ConfigError, nearest
from ..recipe import Recipe


@dataclass(frozen=True)
class TrainSettings:
    """Of the train section.

    Attributes:
        micro_batch: Sequences of one forward on one device.
        accumulation: Forwards of one optimizer step.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: TrainingArguments' name of it.
        half: The type of mixed precision; None without it.
        max_steps: Optimizer steps; as many as `epochs` make where not positive.
        epochs: Over the data.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool
    optimizer: str
    half: torch.dtype | None
    max_steps: int
    epochs: float


def read_settings(recipe: Recipe) -> TrainSettings:
    """Read a recipe's train section, without the devices and packages that the training itself needs.

    Raises:
        ConfigError: If a setting is unknown, or no number where it must be one.
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
        raise ConfigError(f"train: `{name}` must be a whole number from 1 on, got {value!r}")
    return value
