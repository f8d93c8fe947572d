"""Shrink a family's own config class to a tiny model, by the names that transformers gives to sizes.

A rule over names, so that a family that a new release adds is shrunk by the habits of the families before it. What the
rule cannot know about a family is in `overrides.py`.
"""

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_VOCAB = 128
_HIDDEN = 32
_NUM_LAYERS = 4
_NUM_EXPERTS = 8
_TOP_K = 2
_INIT_STD = 0.1  # the usual 0.02 is for wide layers: in narrow ones hardly a token would differ from the next

# The first rule whose pattern is the whole of a name gives the largest value that it may keep.
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
    """A tiny config of this class.

    Args:
        config_class: The family's.
        overrides: What to set instead of what the rule gives; for a nested config, a dict under its name.
    """
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
    """Fewer layers, with one of every kind that the family's lists of a value per layer tell apart.

    Args:
        own: The config's values.
        per_layer: What single layers have instead, where transformers lets them differ.
    """
    depth_name = next((name for name in _STACK_DEPTHS if isinstance(own.get(name), int)), None)
    if depth_name is None:
        return {}
    depth = own[depth_name]
    lists = {name: value for name, value in own.items() if isinstance(value, list) and len(value) == depth}
    # A list of the layers' own numbers is derived, and the config makes it anew.
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
            place: {name: _shrink(name, value) for name, value in per_layer.get(layer, {}).items()}
            for place, layer in enumerate(sorted(kept))
        }
    return tiny


def _renumber_tokens(own: dict[str, Any]) -> dict[str, int]:
    """Put the placeholders of images, and whatever else marks a place in the text, at the vocabulary's end."""
    names = [name for name in own if re.fullmatch(r".*_token_(id|index)", name) and name not in _SPECIAL_TOKENS]
    return {name: _VOCAB - 1 - place for place, name in enumerate(names)}
