"""Untrusted PEFT configs, checked before the model is touched.

PEFT does whatever a config says. Configs that read other files, import modules, or match names with unbounded patterns
are refused; the adapter is first added to a copy on the meta device, where nothing is allocated, and compared with the
tensors in the adapter's file.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from symphony_hf.errors import UNREADABLE, ConfigError
from symphony_hf.files import ADAPTER_CONFIG, MAX_CONFIG_BYTES, read_object
from symphony_hf.patching.families.probe import full_shape, twin

from .targets import family_of

_KINDS = ("LORA", "LOHA", "LOKR", "IA3")
"""Adapter types of PEFT that have only tensors; others load more adapters or states from paths in the config."""

_NOT_LOADED = ("megatron_config", "monteclora_config")
"""Settings of LoraConfig that import a module named in the config, or initialize weights that are not in the file."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_PATTERNS_TO_VALUES = ("rank_pattern", "alpha_pattern")
_MOST_REPETITIONS = 3


def read_peft_config(folder: Path) -> Any:
    """Return the config of an adapter, as PEFT reads it. One that is invalid or not allowed raises ConfigError."""
    from peft import PeftConfig

    file = folder / ADAPTER_CONFIG
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
    with refusals(str(file)):
        config = PeftConfig.from_pretrained(str(folder))
    # It is '' for a model without a name, which PEFT would compare with the base model's.
    config.base_model_name_or_path = config.base_model_name_or_path or None
    return config


def try_config(model: nn.Module, config: Any, weights: Path, name: str) -> None:
    """Add an adapter to a copy of the model on the meta device, and compare it with the adapter's safetensors file.

    Raises:
        ConfigError: If PEFT cannot make an adapter of the config, or its tensors are not those in the file.
    """
    copied, tried = _without_numbers(model), copy.deepcopy(config)
    with refusals(f"{weights.parent / ADAPTER_CONFIG}"), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the model itself
        adapted = add_adapter(copied, tried, name)
        with safe_open(weights, framework="pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        wanted = adapter_tensors(adapted, name, stored)
    check_tensors(weights.parent, model, {key: tuple(tensor.shape) for key, tensor in wanted.items()}, stored)


def adapter_tensors(model: Any, name: str, saved: Collection[str]) -> dict[str, Tensor]:
    """Return what PEFT would save of an adapter now: views of the model's tensors, by their names in the file.

    PEFT adds the embeddings or the head where they are adapted or were resized; here, where the file has them.

    Args:
        model: A PEFT model.
        name: The adapter's name in it.
        saved: Names of the tensors in the adapter's file.
    """
    from peft import get_peft_model_state_dict

    own: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if set(saved) - own.keys():
        whole = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)
        own |= {key: tensor for key, tensor in whole.items() if key in saved}
    return own


def check_tensors(
    folder: Path, model: nn.Module, own: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]]
) -> None:
    """Compare the shapes of an adapter's tensors in a model with those that were saved.

    Raises:
        ConfigError: If a tensor is missing or unexpected, or has another shape.
    """
    lost = sorted({*saved} ^ {*own}) or sorted(key for key in own if own[key] != saved[key])
    if lost:
        raise ConfigError(
            f"`{folder}`: {len(lost)} tensors of the adapter have no place in {family_of(model)}, are missing, or have "
            f"another shape ({lost[0]}, ...): it is of another base model, or of other settings"
        )


def add_adapter(model: Any, config: Any, name: str, *, widens: bool = True) -> Any:
    """Add an adapter to a model and return PEFT's `PeftModel`, the same one if the model already is one.

    `widens` tells whether 16-bit LoRA becomes float32.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=widens)
        return model
    return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=widens)  # type: ignore[arg-type]


@contextlib.contextmanager
def refusals(where: str) -> Iterator[None]:
    """Turn PEFT's errors about a config in a file into ConfigErrors."""
    try:
        yield
    except ConfigError:
        raise
    except (*UNREADABLE, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"`{where}`: no adapter can be made of it: {type(error).__name__}: {reason}") from error


def _check_patterns(file: Path, values: dict[str, Any]) -> None:
    """Refuse regular expressions whose matching may take unbounded time."""
    patterns = [values.get(name) for name in _PATTERNS]
    for name in _PATTERNS_TO_VALUES:
        found = values.get(name)
        patterns += list(found) if isinstance(found, dict) else []
    for pattern in patterns:
        if isinstance(pattern, str) and (
            re.search(r"\)[*+?{]", pattern)
            or len(re.findall(r"[*+{]|(?<!\()\?", pattern)) > _MOST_REPETITIONS
            or len(re.findall(r"\((?=[^()]*\|)", pattern)) > _MOST_REPETITIONS
        ):
            raise ConfigError(
                f"`{file}` has the pattern {pattern!r}, which repeats a group, or repeats or chooses more "
                f"than {_MOST_REPETITIONS} times: matching with it may take forever; list the modules' names instead"
            )


def _without_numbers(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device with its own configs, since PEFT changes configs to repeat layers."""
    copied, configs = twin(model, _meta_like), dict[int, Any]()
    for module in copied.modules():
        if "config" in module.__dict__:
            module.__dict__["config"] = copy.deepcopy(module.__dict__["config"], configs)
    return copied


def _meta_like(tensor: Tensor) -> Tensor:
    """Return a meta tensor of the unpacked shape, with the attributes that PEFT reads from packed weights."""
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None) or full_shape(tensor)
    made: Tensor = torch.empty(shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=False)
    made.__dict__.update({n: value for n, value in tensor.__dict__.items() if isinstance(value, bool | int | str)})
    return made
