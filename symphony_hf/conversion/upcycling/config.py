"""Conversion of a dense model's config to its container, or the reason why that is impossible."""

from collections.abc import Collection
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from symphony_hf.errors import UpcycleError

from .families import Container, Conversion
from .options import UpcycleOptions

COMMON = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
"""Settings that every family has with the same meaning."""

TRANSLATED = ("head_dim", "layer_types", "max_window_layers", "rope_parameters", "sliding_window", "use_sliding_window")
"""Settings that are converted one by one."""

FULL, SLIDING = "full_attention", "sliding_attention"


def container_config(
    dense: PreTrainedConfig, conversion: Conversion, layers: Collection[int], options: UpcycleOptions
) -> PreTrainedConfig:
    """Return the config of the upcycled model, in which the MLPs of `layers` become experts.

    Raises UpcycleError if the dense model has a setting that the container cannot express.
    """
    _check_neutral(dense, conversion)
    container = conversion.container
    values = {name: getattr(dense, name) for name in (*COMMON, *conversion.source.copied)}
    values |= container.settings
    values |= _layer_settings(container, layers, dense.num_hidden_layers)
    values["rope_parameters"] = _rope_parameters(dense, container)
    values[container.expert_size] = dense.intermediate_size
    values[container.num_experts] = options.num_experts
    values["num_experts_per_tok"] = options.top_k
    config_class = CONFIG_MAPPING[container.model_type]
    declared = _defaults(config_class)
    values |= _window_settings(container, declared, windows_of(dense), dense.model_type)
    head_dim = head_dim_of(dense)
    if "head_dim" in declared or head_dim != dense.hidden_size // dense.num_attention_heads:
        values["head_dim"] = head_dim
    return config_class(**values)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the size of an attention head, which not every config has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def windows_of(dense: PreTrainedConfig) -> list[int | None]:
    """Return each layer's sliding attention window in tokens; None for full attention."""
    declared = _defaults(type(dense))  # a config may have more settings, which its family ignores
    window = dense.sliding_window if "sliding_window" in declared else None
    if window is not None and window >= dense.max_position_embeddings:
        window = None
    types = dense.layer_types if "layer_types" in declared else [SLIDING] * dense.num_hidden_layers
    return [window if kind == SLIDING else None for kind in types]


def notes_on(config: PreTrainedConfig, conversion: Conversion) -> list[str]:
    """Return notes on the container that matter beyond logits computed by transformers."""
    notes = []
    if conversion.container.windows == "any" and any(windows_of(config)):
        notes.append(
            f"the sliding window of {config.sliding_window} tokens is exact with eager, sdpa and flex attention; with "
            f"FlashAttention, {config.model_type} of transformers attends to all tokens"
        )
    if config.rope_parameters["rope_type"] == "longrope":
        limit = config.rope_parameters["original_max_position_embeddings"]
        notes.append(
            f"logits are exact below and above {limit} tokens (longrope); but where a generation grows past them, "
            f"{conversion.source.model_type} computes its cache again, and {config.model_type} goes on with what it has"
        )
    return notes


def _check_neutral(dense: PreTrainedConfig, conversion: Conversion) -> None:
    known = {*COMMON, *TRANSLATED, *conversion.source.copied, *conversion.source.unused, *PreTrainedConfig().to_dict()}
    defaults = {name: value for name, value in _defaults(type(dense)).items() if name not in known}
    for name, neutral in {**defaults, **conversion.source.neutral}.items():
        found = getattr(dense, name, neutral)
        if found != neutral:
            raise UpcycleError(
                f"upcycle: the dense config has `{name}: {found!r}`, which `{conversion.container.model_type}` cannot "
                f"express; only {neutral!r} can be upcycled"
            )


def _layer_settings(container: Container, layers: Collection[int], num_layers: int) -> dict[str, Any]:
    if not container.chooses_layers:
        if len(layers) < num_layers:
            raise UpcycleError(
                f"upcycle: every layer of `{container.model_type}` has experts, and {len(layers)} of {num_layers} were "
                "asked for: take all, or a container in which layers can stay dense"
            )
        return {}
    if set(layers) == set(range(1, num_layers, 2)):
        return {"decoder_sparse_step": 2, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": sorted(set(range(num_layers)) - set(layers))}


def _window_settings(
    container: Container, declared: Collection[str], windows: list[int | None], model_type: str
) -> dict[str, Any]:
    sizes = [window for window in windows if window is not None]
    if not sizes:
        return {}
    if container.windows == "none" or (container.windows == "all" and len(sizes) < len(windows)):
        raise UpcycleError(
            f"upcycle: {len(sizes)} of the {len(windows)} layers of this `{model_type}` have a sliding window of "
            f"{sizes[0]} tokens, which `{container.model_type}` cannot express"
        )
    settings: dict[str, Any] = {"sliding_window": sizes[0]}
    if "use_sliding_window" in declared:
        settings["use_sliding_window"] = True
    if container.windows == "any":
        settings["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    return settings


def _rope_parameters(dense: PreTrainedConfig, container: Container) -> dict[str, Any]:
    parameters = dict(dense.rope_parameters)
    part = parameters.pop("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise UpcycleError(
            f"upcycle: this `{dense.model_type}` rotates a part of each head (`partial_rotary_factor: {part}`); "
            f"`{container.model_type}` rotates all of it"
        )
    return parameters


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the settings that a family declares, with their defaults."""
    return config_class().to_dict()
