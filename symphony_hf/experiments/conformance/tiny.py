"""Tiny models of every Mixture-of-Experts family of the installed transformers, which run in milliseconds.

Families are found, not listed, so that those of a new release are tested at once, if the rule of `shrink` fits them.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from .overrides import BROKEN, NOT_BUILT, OVERRIDES

_VOCAB = 128
_HIDDEN = 32
_NUM_LAYERS = 4
_NUM_EXPERTS = 8
_TOP_K = 2
_INIT_STD = 0.1  # the usual 0.02 suits wide layers; in narrow ones, tokens would hardly differ

# Maximum value by a pattern of the setting's name; the first match counts.
_AT_MOST = [
    (r"(qk_)?rope_head_dim|rotary_dim", 8),
    (r".*head_dim|head_size|mamba_d_head|d_kv|kv_channels", 16),
    (r"linear_num_key_heads", 2),
    (r".*heads|num_attention_heads_per_layer", 4),
    (r".*rank", 16),
    (r".*(num|n)_shared_experts|topk_group", 1),
    (r"n_group|num_expert_group|n_groups|mamba_n_groups|o_groups", 2),
    (r".*(intermediate|ffn_hidden|moe_hidden)_size|.*ffn_dim|d_ff|mlp_dim|share_expert_dim", 24),
    (r"index(er)?_(topk.*|budget)", 4),
    (r"zero_expert_num", 2),
    (r".*(sliding_window|window_size|chunk_size|block_size)(_size)?", 8),
    (r".*(state_size|d_state)", 8),
    (r".*vocab_size(_per_layer_input)?", _VOCAB),
    (r".*(hidden|output|out|input|in|projection|embed)_(sizes?|dims?)(_per_layer_input)?", _HIDDEN),
    (r"d_model|.*channels|projection_hidden_dim", _HIDDEN),
    (r"depth|(num|n)_(.*_)?layers|(en|de)coder_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|.*sparse_step", 1),
    (r"num_position_embeddings|position_embedding_size", 64),
    (r"patch_size", 4),
    (r"image_size", 48),
    (r"n(um)?_mel_bins", 8),
]
_EXPERTS = r"(moe_)?(num|n)_(local_|routed_)?experts"
_TOP_KS = r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts"
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_STACK_DEPTHS = ("num_hidden_layers", "n_layers", "num_layers")


def shrink(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    """Build a tiny config of a class. `overrides` replace the rule's settings; for a nested config, by a dict."""
    default = config_class()
    nested = config_class.sub_configs
    fields = [field.name for field in dataclasses.fields(config_class) if field.name not in nested]  # type: ignore[arg-type]
    held = vars(default)
    stored_as = {name: config_class.attribute_map.get(name, name) for name in fields}
    own = {name: held[stored] for name, stored in stored_as.items() if stored in held}
    per_layer = {int(layer): changes for layer, changes in (default.to_dict().get("per_layer_config") or {}).items()}
    tiny = {name: small for name, value in own.items() if (small := _shrink(name, value)) != value}
    tiny |= _shrink_stack(own, per_layer) | _renumber_tokens(own)
    if (heads := own.get("num_attention_heads")) and (own.get("num_key_value_heads") or heads) < heads:
        tiny["num_key_value_heads"] = min(own["num_key_value_heads"], 2)
    tiny |= {name: value for name, value in overrides.items() if name not in nested}
    for name in nested:
        value = getattr(default, name)
        if value is not None:
            tiny[name] = shrink(type(value), overrides.get(name, {}))
        elif name in overrides:
            changes = dict(overrides[name])
            tiny[name] = shrink(CONFIG_MAPPING[changes.pop("model_type")], changes)
    return config_class(**tiny)


def _shrink(name: str, value: Any) -> Any:
    if re.fullmatch(r".*(dropout|jitter|layerdrop|drop_path).*", name) and isinstance(value, float):
        return 0.0
    if re.fullmatch(_EXPERTS, name):
        return _NUM_EXPERTS
    if re.fullmatch(_TOP_KS, name):
        return 1 if value == 1 else _TOP_K
    if name in _SPECIAL_TOKENS:
        return _SPECIAL_TOKENS[name]
    if name in ("initializer_range", "init_std"):
        return _INIT_STD
    limit = next((limit for pattern, limit in _AT_MOST if re.fullmatch(pattern, name)), None)
    if limit is None:
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(min(item, limit) if type(item) is int else item for item in value)
    return min(value, limit) if type(value) is int else value


def _shrink_stack(own: dict[str, Any], per_layer: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Reduce the number of layers, keeping one of every kind in the family's lists of a value per layer."""
    depth_name = next((name for name in _STACK_DEPTHS if isinstance(own.get(name), int)), None)
    if depth_name is None:
        return {}
    depth = own[depth_name]
    lists = {name: value for name, value in own.items() if isinstance(value, list) and len(value) == depth}
    # A list of the layers' own indices is derived: the config makes it anew.
    lists = {name: value for name, value in lists.items() if value != list(range(depth))}
    kinds = list(zip(*lists.values(), (str(per_layer.get(layer)) for layer in range(depth)), strict=True))
    kept = {kinds.index(kind) for kind in kinds}
    # The end of a stack is its steady pattern; its start may be a few dense layers.
    kept |= set(range(depth - max(_NUM_LAYERS - len(kept), 0), depth))
    tiny: dict[str, Any] = {depth_name: len(kept)}
    for name, value in lists.items():
        tiny[name] = [_shrink(name, value[layer]) for layer in sorted(kept)]
    if per_layer:
        tiny["per_layer_config"] = {
            index: {name: _shrink(name, value) for name, value in per_layer.get(layer, {}).items()}
            for index, layer in enumerate(sorted(kept))
        }
    return tiny


def _renumber_tokens(own: dict[str, Any]) -> dict[str, int]:
    """Move the ids of placeholder and marker tokens to the end of the vocabulary."""
    names = [name for name in own if re.fullmatch(r".*_token_(id|index)", name) and name not in _SPECIAL_TOKENS]
    return {name: _VOCAB - 1 - index for index, name in enumerate(names)}


# A multimodal model is built whole; its text part is a family of its own if transformers can load it alone.
_AUTO_CLASSES: tuple[tuple[Any, Mapping[str, Any]], ...] = (
    (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForMultimodalLM, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    (AutoModelForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
)
_MIXTURE = re.compile(r"^class \w*(Router|Expert|MoE|MOE|Moe|TopK\w*Gat)\w*\(nn\.Module", re.MULTILINE)
_ROUTER = re.compile(r"\w*(Router|TopKGating|MoE\w*Gate)|router(_gate)?")
_SELECTION_BIAS = re.compile(r".*(correction_bias|expert_bias|balancing_biases)")
_LOGIT_STD, _BIAS_STD = 2.0, 0.1


@cache
def moe_families() -> list[str]:
    """Return the sorted model types whose modeling module has a router or experts.

    The source is searched, so that no module is imported. A part of a model that no Auto class loads on its own, such
    as a vision encoder, is left out.
    """
    models = Path(transformers.__file__).parent / "models"
    modules = {
        source.parent.name
        for source in models.glob("*/modeling_*.py")
        if _MIXTURE.search(source.read_text(encoding="utf-8"))
    }
    types = [name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) in modules]
    loadable = [name for name in types if auto_class_of(name)]
    lost = modules - {model_type_to_module_name(name) for name in loadable}
    return sorted(loadable + [name for name in types if model_type_to_module_name(name) in lost])


def why_not_built(model_type: str) -> str | None:
    """Return why a family has no tiny model under the installed transformers; None if it has one."""
    releases, fault = BROKEN.get(model_type, ("<0", ""))
    if SpecifierSet(releases, prereleases=True).contains(transformers.__version__):
        return f"broken in transformers {releases}: {fault}"
    return NOT_BUILT.get(model_type)


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the family's own config, shrunk, or raise ValueError with the reason."""
    if reason := why_not_built(model_type):
        raise ValueError(f"{model_type}: not built: {reason}")
    return shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model of the family in eval mode, with seeded random weights and distinct experts' logits.

    Raises:
        ValueError: If the family cannot be built tiny, with the reason.
    """
    config = tiny_config(model_type)
    auto_class = auto_class_of(model_type)
    if auto_class is None:
        raise ValueError(f"{model_type}: no Auto class of transformers {transformers.__version__} loads it")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto_class.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            _spread_routers(model)
    return _keep_float32(model)


def auto_class_of(model_type: str) -> Any:
    """Return the Auto class that loads a family whole; None if there is none."""
    return next((auto_class for auto_class, names in _AUTO_CLASSES if model_type in names), None)


def _keep_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Cast to float32 what `from_pretrained` keeps in float32 and `from_config` does not."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and any(re.search(rf"(^|\.){part}($|\.)", name) for part in wide):
            tensor.data = tensor.data.float()
    return model


def _spread_routers(model: PreTrainedModel) -> None:
    """Redraw the routers, so that logits are well apart and selection biases matter.

    Families initialize these biases, and some their routers, to zero.
    """
    for name, module in model.named_modules():
        if _ROUTER.fullmatch(type(module).__name__) or _ROUTER.fullmatch(name.rpartition(".")[2]):
            # Gemma 4 and Muse Spark scale the product's input or output.
            scale = getattr(module, "scalar_root_size", 1.0) * getattr(module, "output_multiplier", 1.0)
            for parameter in module.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=_LOGIT_STD / scale * parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=_BIAS_STD)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _SELECTION_BIAS.fullmatch(name):
            tensor.normal_(std=_BIAS_STD)
            if name.endswith("balancing_biases"):
                tensor[-1] = -1.0  # the expert that does nothing; ZAYA sets it on every load
        elif name.endswith("tid2eid"):
            # DeepSeek-V4's first routers look up experts by token id.
            num_experts = model.config.get_text_config().n_routed_experts
            tensor.copy_(torch.rand(len(tensor), num_experts).topk(tensor.shape[1]).indices)
