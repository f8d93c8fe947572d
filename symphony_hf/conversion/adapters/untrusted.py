"""PEFT's config of an adapter from someone else: what it asks for is seen before the model is touched.

PEFT makes of a config whatever it asks for. Here nothing of it reads other files, imports modules, or searches names by
patterns without end; and what it would put into the model is first put into a twin on the meta device, where nothing
is allocated, and compared with the tensors that the adapter's file has.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from symphony_hf.errors import UNREADABLE, ConfigError
from symphony_hf.files import MAX_CONFIG_BYTES, read_object
from symphony_hf.patching.families.probe import full_shape, twin

from .targets import family_of

CONFIG_NAME = "adapter_config.json"
_KINDS = ("LORA", "LOHA", "LOKR", "IA3")
"""PEFT's types that hold nothing but tensors: others load further adapters, or states, from where the config says."""

_NOT_LOADED = ("megatron_config", "monteclora_config")
"""Settings of LoraConfig that import a module which the config names, or draw numbers beside those of the file."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_PATTERNS_TO_VALUES = ("rank_pattern", "alpha_pattern")
_MOST_REPETITIONS = 3


def read_peft_config(folder: Path) -> Any:
    """The config of an adapter, as PEFT reads it.

    Raises:
        ConfigError: If it is none, or of a kind that holds more than tensors, or asks for what it must not.
    """
    from peft import PeftConfig

    file = folder / CONFIG_NAME
    values = read_object(file, ConfigError, max_bytes=MAX_CONFIG_BYTES)
    if values.get("peft_type") not in _KINDS:
        raise ConfigError(f"`{file}`: `peft_type` is {values.get('peft_type')!r}: only {', '.join(_KINDS)} are loaded")
    for name in _NOT_LOADED:
        if values.get(name) is not None:
            raise ConfigError(
                f"`{file}`: `{name}` is {values[name]!r}, and adapters with it are not loaded: it asks for "
                "more than the tensors of the file"
            )
    _check_patterns(file, values)
    with refusals(str(file)), warnings.catch_warnings():
        # The settings are there for whoever loads the adapter without its record.
        warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['symphony'\]")
        config = PeftConfig.from_pretrained(str(folder))
    # A model without a name has '' there, which PEFT would compare with the base model's.
    config.base_model_name_or_path = config.base_model_name_or_path or None
    return config


def try_config(model: nn.Module, config: Any, weights: Path, name: str) -> None:
    """Put an adapter into a twin of the model, without numbers, and compare it with what a file holds.

    Args:
        model: Symphonized as the adapter needs it; left as it is.
        config: From `read_peft_config`.
        weights: The adapter's safetensors.
        name: What the adapter will be called.

    Raises:
        ConfigError: If PEFT can make no adapter of it, or another one than the file's.
    """
    from peft import get_peft_model_state_dict

    copied, tried = _without_numbers(model), copy.deepcopy(config)
    with refusals(f"{weights.parent / CONFIG_NAME}"), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again, with the model itself
        adapted = add_adapter(copied, tried, name)
        wanted = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    with safe_open(weights, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    check_tensors(weights.parent, model, {key: tuple(tensor.shape) for key, tensor in wanted.items()}, stored)


def check_tensors(
    folder: Path, model: nn.Module, own: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]]
) -> None:
    """Compare the tensors that an adapter has in a model with those that were saved.

    Raises:
        ConfigError: If one is missing, has no place, or has another shape.
    """
    lost = sorted({*saved} ^ {*own}) or sorted(key for key in own if own[key] != saved[key])
    if lost:
        raise ConfigError(
            f"`{folder}`: {len(lost)} tensors of the adapter have no place in {family_of(model)}, are missing, or have "
            f"another shape ({lost[0]}, ...): it is of another base model, or of other settings"
        )


def add_adapter(model: Any, config: Any, name: str, *, widens: bool = True) -> Any:
    """Put an adapter into a model: PEFT's `PeftModel`, the same one if it is one already.

    Args:
        model: Symphonized, or a `PeftModel` of such a one.
        config: PEFT's.
        name: Of the adapter.
        widens: Whether LoRA of 16 bits becomes float32.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=widens)
        return model
    return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=widens)  # type: ignore[arg-type]


@contextlib.contextmanager
def refusals(where: str) -> Iterator[None]:
    """One kind of error for whatever PEFT cannot make of a config.

    Args:
        where: The config's file.
    """
    try:
        yield
    except ConfigError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"`{where}`: no adapter can be made of it: {type(error).__name__}: {reason}") from error


def _check_patterns(file: Path, values: dict[str, Any]) -> None:
    """Refuse regular expressions that may search a module's name for longer than anyone waits."""
    patterns = [values.get(name) for name in _PATTERNS]
    for name in _PATTERNS_TO_VALUES:
        found = values.get(name)
        patterns += list(found) if isinstance(found, dict) else []
    for pattern in patterns:
        if isinstance(pattern, str) and (
            re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MOST_REPETITIONS
        ):
            raise ConfigError(
                f"`{file}` has the pattern {pattern!r}, which repeats a group, or repeats more than "
                f"{_MOST_REPETITIONS} times: to match names with it may take for ever; name the modules in a list"
            )


def _without_numbers(model: nn.Module) -> nn.Module:
    """A twin on the meta device, with configs of its own: PEFT changes a config where layers are to be repeated."""
    copied, configs = twin(model, _meta_like), dict[int, Any]()
    for module in copied.modules():
        if "config" in module.__dict__:
            module.__dict__["config"] = copy.deepcopy(module.__dict__["config"], configs)
    return copied


def _meta_like(tensor: Tensor) -> Tensor:
    """Of the shape that a tensor stands for, and with the attributes that PEFT asks a packed weight for."""
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None) or full_shape(tensor)
    made: Tensor = torch.empty(shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=False)
    made.__dict__.update({n: value for n, value in tensor.__dict__.items() if isinstance(value, bool | int | str)})
    return made
