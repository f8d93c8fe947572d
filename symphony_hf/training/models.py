"""Model of a recipe: built or loaded, upcycled, symphonized, adapted, and its trained parameters selected."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from symphony_hf.checkpoints.model_class import without_empty_experts_warning
from symphony_hf.config import SymphonyConfig
from symphony_hf.data.prepared import check_lengths
from symphony_hf.errors import ConfigError, nearest
from symphony_hf.models.llava import build_llava, is_after_layers, llava_config, vision_config_of
from symphony_hf.patching.symphonize import is_symphonized, symphonize
from symphony_hf.patching.upcycle_modules import upcycle_modules
from symphony_hf.recipe import ModelSection, PeftSection, Recipe
from symphony_hf.settings import check_names

from .model_config import IMAGE_TOKEN, as_config_error, build_config, vocabulary_of
from .processors import expected_vocabulary
from .zero import gathered


def auto_class(recipe: Recipe) -> Any:
    """Return the Auto class for the recipe's kind of data."""
    return AutoModelForImageTextToText if recipe.data.kind == "llava" else AutoModelForCausalLM


def empty_model(recipe: Recipe) -> PreTrainedModel:
    """Build the recipe's model on the meta device, without weights.

    One that is built has the vocabulary of `expected_vocabulary`.

    Raises:
        ConfigError: If its config could not be loaded, the dtype of its checkpoint is unknown, or transformers refuses
            a setting.

    Warns:
        SymphonyWarning: If the vocabulary is that of a tokenizer that is not on this machine.
    """
    section = recipe.model
    if section.config is None:
        config = _stored_config(section)
    else:
        config = build_config(section, None if section.path is not None else expected_vocabulary(recipe))
    settings = {"dtype": _dtype_of(section, config), **_implementations(section)}
    if "flash" in settings.get("attn_implementation", ""):
        settings["attn_implementation"] = "sdpa"  # which needs no package, and has the same size
    if section.vision is not None:
        with as_config_error(f"the config of `{section.vision}` could not be loaded"):
            vision = vision_config_of(section.vision)
        # The image token may be any: the tokenizer is not loaded, and no size depends on it.
        config = llava_config(config, vision, config.vocab_size - 1)
    with torch.device("meta"), without_empty_experts_warning():
        with as_config_error("it could not be built"):
            model = auto_class(recipe).from_config(config, **settings)
        return _upcycle(model, section)


def _stored_config(section: ModelSection) -> PreTrainedConfig:
    with as_config_error(f"the config of `{section.path}` could not be loaded"):
        return AutoConfig.from_pretrained(section.path, revision=section.revision)


def _dtype_of(section: ModelSection, config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype in which `load_model` loads or builds the weights."""
    if section.dtype != "auto":
        return getattr(torch, section.dtype)  # type: ignore[no-any-return]
    if section.path is None:
        return torch.float32
    if section.config is None:
        return config.dtype
    try:
        return _stored_config(section).dtype
    except ConfigError as error:
        raise ConfigError(f"{error}; without it, `dtype: auto` is unknown: set `model.dtype`") from error


def _implementations(section: ModelSection) -> dict[str, Any]:
    named = {"attn_implementation": section.attention, "experts_implementation": section.experts}
    return {name: value for name, value in named.items() if value is not None}


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the model of a recipe, or build it with random weights.

    A checkpoint that differs from the recipe's `config` raises ConfigError.
    """
    section, auto = recipe.model, auto_class(recipe)
    settings: dict[str, Any] = {"dtype": section.dtype, **_implementations(section)}
    if section.path is not None:
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        _check_config(config, section)
        check_lengths(recipe.data, config)
        if section.vision is not None:
            image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            model = build_llava(
                section.path, section.vision, image_token_id, dtype=section.dtype, text_revision=section.revision
            )
            for name, implementation in _implementations(section).items():
                getattr(model, f"set_{name}")(implementation)
            return _upcycle(model, section)
        if section.quantization is not None:
            return _upcycle(_load_in_4_bits(section, auto, config, settings), section)
        with without_empty_experts_warning():
            return _upcycle(auto.from_pretrained(section.path, revision=section.revision, **settings), section)
    config = build_config(section, vocabulary_of(tokenizer))
    settings["dtype"] = _dtype_of(section, config)
    check_lengths(recipe.data, config)
    with without_empty_experts_warning():
        return _upcycle(auto.from_config(config, **settings), section)


def _load_in_4_bits(
    section: ModelSection, auto: Any, config: PreTrainedConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    from symphony_hf.conversion.quantization.quantize_experts import quantize_experts

    compute_dtype = config.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    linears = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return quantize_experts(
        section.path,  # type: ignore[arg-type]
        model_class=auto,
        revision=section.revision,
        quantization_config=linears,
        **settings,
    )


def _upcycle(model: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """Upcycle the modules that the recipe names, if any; a checkpoint may have been upcycled already."""
    settings = section.upcycle_modules
    if settings is None:
        return model
    recorded = getattr(model.config, "upcycled", None)
    if recorded is None:
        known = [*inspect.signature(upcycle_modules).parameters][1:]
        settings = check_names(settings, known, "model: upcycle_modules")
        patterns = settings.get("patterns", [])
        matching = [m for name, m in model.named_modules() if any(fnmatchcase(name, p) for p in patterns)]
        with gathered([parameter for module in matching for parameter in module.parameters()]):
            return upcycle_modules(model, **settings)
    differing = [
        name for name in ("num_experts", "top_k", "head") if settings.get(name, recorded[name]) != recorded[name]
    ]
    if differing:
        raise ConfigError(
            f"model: upcycle_modules: `{section.path}` was upcycled with other settings ({', '.join(differing)})"
        )
    return model


def _check_config(config: PreTrainedConfig, section: ModelSection) -> None:
    """Refuse a checkpoint of another model than the recipe was made for, before its weights are read."""
    for name, wanted in (section.config or {}).items():
        found = getattr(config, name, None)
        found = found.to_dict() if isinstance(found, PreTrainedConfig) else found
        if isinstance(wanted, dict) and isinstance(found, dict):
            found = {key: found.get(key) for key in wanted}
        if found != wanted:
            raise ConfigError(
                f"model: the recipe's `config` says {name}={wanted!r}, but `{section.path}` has {found!r}: give the "
                "checkpoint that the recipe was made for, or change the recipe"
            )


def add_graph(model: PreTrainedModel, recipe: Recipe) -> None:
    """Symphonize the model with the recipe's settings. A Symphony checkpoint must have been saved with the same ones.

    Raises:
        ConfigError: If the checkpoint's settings differ from the recipe's.
    """
    if not is_symphonized(model):
        if recipe.symphony is not None:
            symphonize(model, recipe.symphony)
        return
    stored = SymphonyConfig.from_stored(model.config.symphony)
    if recipe.symphony != stored:
        wanted = {} if recipe.symphony is None else recipe.symphony.to_dict()
        differing = [name for name, value in stored.to_dict().items() if wanted.get(name) != value]
        raise ConfigError(
            f"symphony: the checkpoint `{recipe.model.path}` was saved with other settings ({', '.join(differing)}): "
            "use the same ones, or set `model.path` to the plain base model and `symphony.graph` to this checkpoint, "
            "which keeps its graph"
        )


def choose_trained(model: PreTrainedModel, patterns: list[str] | None) -> None:
    """Freeze all parameters except those that match a pattern, and the unused ones of a vision tower.

    Raises:
        ConfigError: If a pattern matches no parameter.
    """
    for parameter in _unread_parameters(model):
        parameter.requires_grad_(False)
    if patterns is None:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = {re.sub(r"\b\d+\b", "*", name) for name in names}
            raise ConfigError(f"model: trainable: `{pattern}` matches no parameter; {nearest(pattern, known)}")
    for name, parameter in model.named_parameters():
        chosen = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(chosen and parameter.requires_grad)


def _unread_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yield the parameters of LLaVA's vision tower after the layer whose features are used. They never get a gradient,
    and DistributedDataParallel would wait for one."""
    layer = getattr(model.config, "vision_feature_layer", None)
    tower = next((module for name, module in model.named_modules() if name.endswith("vision_tower")), None)
    if not isinstance(layer, int) or layer >= 0 or tower is None:
        return
    layers = next((module for module in tower.modules() if isinstance(module, nn.ModuleList)), None)
    assert layers is not None
    for module in layers[len(layers) + layer + 1 :]:
        yield from module.parameters()
    for name, parameter in tower.named_parameters():
        if is_after_layers(name):
            yield parameter


def add_adapters(model: PreTrainedModel, section: PeftSection | None) -> Any:
    """Add LoRA adapters to the model, if there is a section for them. Those of a Symphony model contain its graphs."""
    if section is None:
        return model
    from peft import get_peft_model

    from symphony_hf.conversion.adapters.lora import lora_config, plain_lora_config

    settings = dataclasses.asdict(section) | {"alpha": 2 * section.r if section.alpha is None else section.alpha}
    config = (lora_config if is_symphonized(model) else plain_lora_config)(model, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # in PEFT
        return get_peft_model(model, config)
