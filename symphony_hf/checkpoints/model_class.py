"""Configs and model classes of checkpoints, and models built on the meta device, without weights."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
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
from symphony_hf.files import ADAPTER_CONFIG, CONFIG

from .marks import ARCHITECTURE_PREFIX

_MAPPINGS = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,  # a model with images comes whole
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

INVALID_CONFIG = (OSError, ValueError, TypeError, KeyError, StrictDataclassError)
"""Errors of transformers for a config that is missing or that it cannot read."""


def read_config(source: str | Path, revision: str | None = None, **loading: Any) -> PreTrainedConfig:
    """Return the config of a checkpoint.

    Args:
        source: Folder, config.json, or name on the Hub.
        revision: Branch, tag or commit on the Hub.
        **loading: Further arguments of `from_pretrained`, such as `token`.

    Raises:
        ConfigError: If there is no config, or transformers does not know its model type or refuses a value.
    """
    if not (Path(source) / CONFIG).exists():
        if (Path(source) / ADAPTER_CONFIG).exists():
            raise ConfigError(f"`{source}` is an adapter, not a model: give its base model")
        if any((Path(source) / "final" / name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
            raise ConfigError(f"`{source}` is the folder of a run, not a model: give `{Path(source) / 'final'}`")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, **loading)
    except INVALID_CONFIG as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"`{source}`: no config of a model that transformers knows: {reason}") from error


def model_class_of(config: PreTrainedConfig, source: str | Path) -> type[PreTrainedModel]:
    """Return the model class of a config.

    Args:
        config: Result of `read_config`.
        source: Source of the config, for error messages.

    Raises:
        ConfigError: If transformers has no model class for it.
    """
    found = _named_class(config) or next(_mapped_classes(config), None)
    if found is None:
        raise ConfigError(f"`{source}`: transformers {transformers.__version__} has no model for {config.model_type}")
    return found


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and those inside it."""
    yield config
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            yield from nested_configs(inner)


def named_class_of(config: PreTrainedConfig, where: str, error: type[SymphonyError]) -> type[PreTrainedModel]:
    """Return the class that a config names; another one of the family might drop some of the weights.

    Args:
        config: Result of `read_config`.
        where: Source of the config, for error messages.
        error: Error type to raise.

    Raises:
        SymphonyError: Of the given type, if transformers does not have that class, and none was registered.
    """
    found = _named_class(config)
    if found is None:
        named = (config.architectures or ["in its config"])[0]
        raise error(f"{where}: transformers has no model class {named}")
    return found


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the named class from transformers, or from its Auto classes, where this package registers its own."""
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
        source: Folder, config.json, or name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: If there is no config, or transformers does not know its model type.
    """
    config = read_config(source, revision)
    model_class = model_class_of(config, source)
    with torch.device("meta"), without_empty_experts_warning():
        return model_class(config)


@contextlib.contextmanager
def without_empty_experts_warning() -> Iterator[None]:
    """Ignore torch's warning about the shared expert of Qwen2-MoE, which has size 0 if there is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield
