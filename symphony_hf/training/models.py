"""The model that a recipe means, with its graph."""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import SymphonyConfig
from ..data import check_lengths
from ..errors import ConfigError
from ..modules import build_llava, llava_config, upcycle_modules, vision_config_of
from ..parsing import check_names
from ..patching import is_symphonized, symphonize
from ..recipe import ModelSection, Recipe
from .zero import gathered

IMAGE_TOKEN = "<image>"


def auto_class(recipe: Recipe) -> Any:
    """The Auto class of the recipe's kind of data."""
    return AutoModelForImageTextToText if recipe.data.kind == "llava" else AutoModelForCausalLM


def build_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The config that a model section spells out; the vocabulary is the tokenizer's.

    Raises:
        ConfigError: If transformers knows no such family, or its config refuses a value.
    """
    fields, of_text = dict(section.config or {}), {}
    if tokenizer is not None:
        of_text = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    if "text_config" in fields:
        fields["text_config"] = {**of_text, **fields["text_config"]}
        if tokenizer is not None:
            fields["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    else:
        fields = {**of_text, **fields}
    model_type = fields.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: config: {error}") from error


def empty_model(recipe: Recipe) -> PreTrainedModel:
    """The recipe's model without weights, on the meta device.

    Raises:
        ConfigError: If its config is not to be had.
    """
    section = recipe.model
    if section.config is not None:
        fields = {"vocab_size": recipe.data.vocab_size} if section.path is None else {}
        config = build_config(dataclasses.replace(section, config={**fields, **section.config}), None)
    else:
        config = _stored_config(section)
    with torch.device("meta"), _without_empty_experts_warning():
        dtype = config.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
        return _upcycle(auto_class(recipe).from_config(config, dtype=dtype), section)


def _stored_config(section: ModelSection) -> PreTrainedConfig:
    """The checkpoint's config; where a vision tower is put to it, that of both."""
    try:
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        if section.vision is None:
            return config
        # Any token stands for an image here: the tokenizer is not read, and no size depends on it.
        return llava_config(config, vision_config_of(section.vision), config.vocab_size - 1)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"model: the config of `{section.path}` is not to be had: {first}") from error


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that a recipe names, or builds with random weights.

    Raises:
        ConfigError: If the checkpoint is not what the recipe's `config` says.
    """
    section, auto = recipe.model, auto_class(recipe)
    settings: dict[str, Any] = {"dtype": section.dtype}
    if section.attention is not None:
        settings["attn_implementation"] = section.attention
    if section.experts is not None:
        settings["experts_implementation"] = section.experts
    if section.path is not None:
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        _check_config(config, section)
        check_lengths(recipe.data, config)
        if section.vision is not None:
            image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            dtype = "auto" if section.dtype == "auto" else getattr(torch, section.dtype)
            model = build_llava(
                section.path, section.vision, image_token_id, dtype=dtype, text_revision=section.revision
            )
            return _upcycle(model, section)
        if section.quantization is not None:
            return _upcycle(_load_in_4_bits(section, auto, config, settings), section)
        with _without_empty_experts_warning():
            return _upcycle(auto.from_pretrained(section.path, revision=section.revision, **settings), section)
    settings["dtype"] = torch.float32 if section.dtype == "auto" else getattr(torch, section.dtype)
    config = build_config(section, tokenizer)
    check_lengths(recipe.data, config)
    with _without_empty_experts_warning():
        return _upcycle(auto.from_config(config, **settings), section)


def _load_in_4_bits(
    section: ModelSection, auto: Any, config: PreTrainedConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    from ..quantization import quantize_experts

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
    """Make the recipe's modules mixtures of experts, if it names any; a checkpoint of them has them already."""
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


@contextlib.contextmanager
def _without_empty_experts_warning() -> Iterator[None]:
    """Qwen2-MoE has a shared expert, of size 0 where there is none, and torch warns that it has nothing to draw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield


def _check_config(config: PreTrainedConfig, section: ModelSection) -> None:
    """A checkpoint of another model than the recipe was made for is refused before its weights are read."""
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
    """Give the model the recipe's graph settings; a Symphony checkpoint brings its own, which must be the same.

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
            "give the same ones, or start from its base model with `symphony.graph` set to the checkpoint's path"
        )
