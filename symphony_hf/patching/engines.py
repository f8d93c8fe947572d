"""Config values that serving engines take whatever a checkpoint's config says.

An engine has its own code for each family, and this code reads some settings and not others. A checkpoint with another
value is loaded and computed wrongly, or refused. Each entry was read in the engine's source. Some were seen with the
engine running, too: `norm_topk_prob` of OLMoE in both, and of Qwen2-MoE in llama.cpp; in vLLM, `attention_bias` of
GraniteMoE and Qwen3-MoE, and `qkv_bias`, `shared_expert_intermediate_size` and `layer_types` of Qwen2-MoE.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from transformers import PreTrainedConfig

ENGINES = {"vLLM": "vLLM 0.32.0", "llama.cpp": "llama.cpp (llama-cpp-python 0.3.36)"}
"""Engines with the versions whose sources were read."""


@dataclass(frozen=True)
class Other:
    """Any value but one, which the engine refuses."""

    value: Any


class Alike:
    """List of equal values, one for each layer; the engine takes one for all."""


@dataclass(frozen=True)
class Needed:
    """Value that transformers computes with but does not write, while the engine's default is another."""

    value: Any


NO_BIAS: dict[str, Any] = {"attention_bias": False}
SILU: dict[str, Any] = {"hidden_act": "silu"}
NORMALIZED: dict[str, Any] = {"norm_topk_prob": True}
ALL_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
NO_WINDOW: dict[str, Any] = {"sliding_window": None}
SIGMOID: dict[str, Any] = {"scoring_func": Needed("sigmoid")}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": Other(0)}
SWIGLU: dict[str, Any] = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
DBRX: dict[str, Any] = {"ffn_config.moe_normalize_expert_weights": 1.0, "ffn_config.ffn_act_fn": {"name": "silu"}}

FIXED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "vLLM": {
        "axk1": NO_BIAS,
        "cohere2_moe": NO_BIAS | SILU,
        "dbrx": DBRX,
        "deepseek_v2": NO_BIAS | {"mlp_bias": False},
        "deepseek_v3": NO_BIAS | SIGMOID | {"topk_method": Needed("noaux_tc"), "rope_interleave": True},
        "ernie4_5_moe": {"moe_norm_min": 1e-12},
        "glm4_moe_lite": {"rope_interleave": True},
        "gpt_oss": SWIGLU | {"attention_bias": True, "rms_norm_eps": 1e-5},
        "granitemoe": NO_BIAS,
        "granitemoe_swa": NO_BIAS,
        "granitemoeshared": NO_BIAS,
        "hy_v3": NO_BIAS | {"mlp_bias": False},
        "lfm2_moe": {"conv_bias": False},
        "longcat_flash": NO_BIAS,
        "mimo_v2_flash": {"routed_scaling_factor": 1.0},
        "mixtral": SILU,
        "olmoe": NO_BIAS | SILU | {"clip_qkv": None, "norm_topk_prob": False, "rms_norm_eps": 1e-5},
        "qwen2_moe": SHARED | {"qkv_bias": True, "layer_types": Alike()},
        "qwen3_moe": NO_BIAS,
        "qwen3_next": NO_BIAS,
    },
    "llama.cpp": {
        "afmoe": SILU,
        "cohere2_moe": SILU,
        "dbrx": DBRX,
        "deepseek_v2": SILU,
        "deepseek_v3": SILU | SIGMOID | {"rope_interleave": True},
        "dots1": SILU,
        "ernie4_5_moe": SILU | {"moe_layer_interval": 1, "moe_norm_min": 1e-12},
        "glm4_moe": SILU,
        "gpt_oss": SWIGLU,
        "hunyuan_v1_moe": SILU,
        "hy_v3": SILU,
        "jamba": SILU,
        "laguna": SILU | {"moe_router_logit_softcapping": 0.0},
        "lfm2_moe": NORMALIZED | {"routed_scaling_factor": 1.0},
        "mellum": SILU | NORMALIZED,
        "mimo_v2_flash": SILU | NORMALIZED | {"routed_scaling_factor": 1.0},
        "minimax_m2": SILU,
        "mixtral": SILU | NO_WINDOW,
        "olmoe": SILU | {"norm_topk_prob": False},
        "qwen2_moe": SILU | ALL_SPARSE | SHARED | NO_WINDOW | {"norm_topk_prob": False},
        "qwen3_moe": SILU | ALL_SPARSE | NO_WINDOW | NORMALIZED,
        "qwen3_next": SILU | ALL_SPARSE | NORMALIZED,
    },
}
"""Engine -> model type -> setting -> its value in the engine. A dotted name is a setting of a sub-config."""

_MISSING = object()


def engine_warnings(config: PreTrainedConfig) -> list[str]:
    """Return a sentence for each setting of a model that an engine is known to take differently."""
    config = config.get_text_config(decoder=True)
    engines: dict[str, list[str]] = {}
    for engine, families in FIXED.items():
        for name, value in families.get(config.model_type, {}).items():
            if sentence := _difference(config, name, value):
                engines.setdefault(sentence, []).append(ENGINES[engine])
    return [sentence.format(" and ".join(names)) for sentence, names in engines.items()]


def _difference(config: PreTrainedConfig, name: str, value: Any) -> str | None:
    found = reduce(lambda parent, part: getattr(parent, part, _MISSING), name.split("."), config)
    setting = f"`{name}` of this `{config.model_type}`"
    if isinstance(value, Needed):
        if found == value.value:
            return None
        return f"{setting} is not in its config: add {value.value!r}, or it is another model in {{}}"
    if isinstance(value, Other):
        return f"{setting} is {found!r}, which {{}} cannot load" if found == value.value else None
    if isinstance(value, Alike):
        different = found is not _MISSING and len(set(found or ())) > 1
        return f"{setting} differs between layers, and is the same for all in {{}}" if different else None
    if found is _MISSING or found == value or (not found and value in ([], None)):
        return None
    return f"{setting} is {found!r}, and always {value!r} in {{}}: the model is another one there, or refused"
