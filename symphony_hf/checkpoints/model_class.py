"""Models built from a checkpoint's config alone, on the meta device: everything is there but the numbers."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from symphony_hf.errors import ConfigError, SymphonyError

from .saving import ARCHITECTURE_PREFIX

_MAPPINGS = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,  # a model with images comes whole
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)


def read_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The config of a checkpoint.

    Args:
        source: Its folder, its config.json, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: If there is none, or it is of no model that transformers knows.
    """
    if (Path(source) / "adapter_config.json").exists() and not (Path(source) / "config.json").exists():
        raise ConfigError(f"`{source}` is an adapter, not a model: give its base model")
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{source}`: no config of a model of transformers: {error}") from error


def model_class_of(config: PreTrainedConfig, source: str | Path) -> type[PreTrainedModel]:
    """The class of the model that a config is of.

    Args:
        config: From `read_config`.
        source: Where from, for the error message.

    Raises:
        ConfigError: If transformers has none.
    """
    found = _named_class(config) or next(_mapped_classes(config), None)
    if found is None:
        raise ConfigError(f"`{source}`: transformers {transformers.__version__} has no model for {config.model_type}")
    return found


def named_class_of(config: PreTrainedConfig, where: str, error: type[SymphonyError]) -> type[PreTrainedModel]:
    """The very class that a config names: another one of its family might leave out some of the weights.

    Args:
        config: From `read_config`.
        where: Where from, for the error message.
        error: What to raise.

    Raises:
        SymphonyError: The given kind, if it names none that transformers has or was told of.
    """
    found = _named_class(config)
    if found is None:
        named = (config.architectures or ["in its config"])[0]
        raise error(f"{where}: transformers has no model class {named}")
    return found


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """One of transformers, or one that its Auto classes know, as they do this package's own."""
    for name in (str(name).removeprefix(ARCHITECTURE_PREFIX) for name in (config.architectures or ())[:1]):
        registered = (kind for kind in _mapped_classes(config) if kind.__name__ == name)
        for found in (getattr(transformers, name, None), *registered):
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                return found
    return None


def _mapped_classes(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    for mapping in _MAPPINGS:
        if type(config) in mapping:
            classes = mapping[type(config)]
            yield from classes if isinstance(classes, tuple) else (classes,)


def empty_model(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """Build a checkpoint's model on the meta device.

    Args:
        source: Its folder, its config.json, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: If there is no config, or it is of no model that transformers knows.
    """
    config = read_config(source, revision)
    model_class = model_class_of(config, source)
    with torch.device("meta"), warnings.catch_warnings():
        # torch, of Qwen2-MoE without a shared expert, whose weights are there and empty.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return model_class(config)
