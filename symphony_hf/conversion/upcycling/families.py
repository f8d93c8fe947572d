"""Dense families and the MoE families ("containers") of transformers that they can become, as data.

Dense families differ in how they store projections; once fused ones are split, all have Llama's names. Containers
differ in how they store experts and in what their settings can express. A conversion is a pair that computes the same
up to rounding when every expert is a copy of the dense MLP and the weights of the selected experts sum to 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from symphony_hf.errors import UpcycleError, nearest

GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
"""Names of the three projections of a gated MLP within a decoder layer."""


@dataclass(frozen=True)
class DenseFamily:
    """Family of dense decoders.

    Attributes:
        model_type: Model type of its config.
        fused: Names of fused projections within a layer -> names of their parts, in order.
        neutral: Settings that no container has, with the value at which a container computes the same.
        unused: Settings that its class in transformers ignores.
        copied: Settings of this family that its containers have under the same names.
    """

    model_type: str
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Container:
    """MoE family of transformers, as its own `save_pretrained` stores it.

    Attributes:
        model_type: Model type of its config.
        experts: Names of the expert tensors within a decoder layer -> projections in their rows. A name with `{expert}`
            is one tensor per expert; one without holds all experts along its first dimension.
        router: Name of the router's weight within the layer.
        router_in_memory: Its name in the model, if transformers renames it during loading.
        zeros: Names of tensors of zeros within the layer -> their shapes, where `hidden` is the hidden size.
        num_experts: Name of the setting for the number of experts.
        expert_size: Name of the setting for an expert's inner size.
        windows: Layers that may have a sliding attention window: `none`, `all` (all or none), or `any`.
        chooses_layers: Whether some layers can stay dense.
        settings: Fixed settings: the weights of the selected experts sum to 1, and no shared expert adds to them.
        needs: Reason why other families do not fit, for error messages.
    """

    model_type: str
    experts: Mapping[str, tuple[str, ...]]
    router: str
    router_in_memory: str
    num_experts: str
    expert_size: str
    windows: str
    chooses_layers: bool
    needs: str
    zeros: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """Dense family and container.

    Attributes:
        source: Dense family.
        container: MoE family that it becomes.
        zero_biases: Projections that have a bias in the container and none in the dense family.
    """

    source: DenseFamily
    container: Container
    zero_biases: tuple[str, ...] = ()


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

SHARED_WIDTH = 16
"""Width of a shared expert of zeros: servers load neither Qwen2-MoE without one, nor without biases.

All of its gradients are zero, so it stays zero in training.
"""

_QWEN_EXPERTS = {f"mlp.experts.{{expert}}.{part.removeprefix('mlp.')}.weight": (part,) for part in (GATE, UP, DOWN)}

MIXTRAL = Container(
    model_type="mixtral",
    experts={
        "block_sparse_moe.experts.{expert}.w1.weight": (GATE,),
        "block_sparse_moe.experts.{expert}.w2.weight": (DOWN,),
        "block_sparse_moe.experts.{expert}.w3.weight": (UP,),
    },
    router="block_sparse_moe.gate.weight",
    router_in_memory="mlp.gate.weight",
    num_experts="num_local_experts",
    expert_size="intermediate_size",
    windows="all",
    chooses_layers=False,
    needs="it has neither biases nor norms on queries and keys, and no multipliers",
)
QWEN2_MOE = Container(
    model_type="qwen2_moe",
    experts=_QWEN_EXPERTS,
    router="mlp.gate.weight",
    router_in_memory="mlp.gate.weight",
    zeros={
        "mlp.shared_expert.gate_proj.weight": (SHARED_WIDTH, "hidden"),
        "mlp.shared_expert.up_proj.weight": (SHARED_WIDTH, "hidden"),
        "mlp.shared_expert.down_proj.weight": ("hidden", SHARED_WIDTH),
        "mlp.shared_expert_gate.weight": (1, "hidden"),
    },
    num_experts="num_experts",
    expert_size="moe_intermediate_size",
    windows="any",
    chooses_layers=True,
    settings={"norm_topk_prob": True, "qkv_bias": True, "shared_expert_intermediate_size": SHARED_WIDTH},
    needs="it has no norms on queries and keys, and no multipliers",
)
QWEN3_MOE = Container(
    model_type="qwen3_moe",
    experts=_QWEN_EXPERTS,
    router="mlp.gate.weight",
    router_in_memory="mlp.gate.weight",
    num_experts="num_experts",
    expert_size="moe_intermediate_size",
    windows="all",
    chooses_layers=True,
    settings={"norm_topk_prob": True},
    needs="it normalizes queries and keys, as Qwen3 alone does",
)
GRANITE_MOE = Container(
    model_type="granitemoe",
    experts={
        "block_sparse_moe.input_linear.weight": (GATE, UP),
        "block_sparse_moe.output_linear.weight": (DOWN,),
    },
    router="block_sparse_moe.router.layer.weight",
    router_in_memory="block_sparse_moe.router.weight",
    num_experts="num_local_experts",
    expert_size="intermediate_size",
    windows="none",
    chooses_layers=False,
    needs="its multipliers are Granite's",
)

MISTRAL = DenseFamily("mistral")
LLAMA = DenseFamily("llama", neutral={"attention_bias": False, "mlp_bias": False}, unused=("pretraining_tp",))
QWEN2 = DenseFamily("qwen2")
QWEN3 = DenseFamily("qwen3", copied=("attention_bias",))
GRANITE = DenseFamily(
    "granite",
    neutral={"mlp_bias": False},
    copied=(
        "attention_bias",
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
    ),
)
PHI3 = DenseFamily(
    "phi3",
    fused={
        "self_attn.qkv_proj": QKV,
        "mlp.gate_up_proj": (GATE, UP),
    },
    neutral={"resid_pdrop": 0.0},
    unused=("embd_pdrop", "original_max_position_embeddings"),  # the latter is in rope_parameters, too
)

CONVERSIONS = (  # the default of a family is its first one in which the layers to upcycle can have experts
    Conversion(MISTRAL, MIXTRAL),
    Conversion(MISTRAL, QWEN2_MOE, QKV),
    Conversion(LLAMA, MIXTRAL),
    Conversion(LLAMA, QWEN2_MOE, QKV),
    Conversion(QWEN2, QWEN2_MOE),
    Conversion(QWEN3, QWEN3_MOE),
    Conversion(GRANITE, GRANITE_MOE),
    Conversion(PHI3, MIXTRAL),
    Conversion(PHI3, QWEN2_MOE, QKV),
)

INEXACT = {
    "dbrx": "it clamps queries, keys and values, and its norms are LayerNorms",
    "deepseek_v2": "its attention compresses keys and values into a latent",
    "deepseek_v3": "its attention compresses keys and values into a latent",
    "flex_olmo": "it normalizes queries and keys over all heads, and after each block instead of before",
    "gpt_oss": "its attention has sinks, and its experts clamp what they compute",
    "jetmoe": "its attention is a mixture of experts, too",
    "llama4_text": "it scales what goes into an expert, not what comes out, by a sigmoid",
    "nllb_moe": "it is an encoder and a decoder",
    "olmoe": "it normalizes queries and keys over all heads",
    "phimoe": "its router gives each chosen expert a probability of its own, and these do not sum to 1; its norms are "
    "LayerNorms",
    "switch_transformers": "it is an encoder and a decoder",
}
"""MoE families that are no containers -> what they compute that no dense family here does."""


def find_conversion(model_type: str, to: str | None, every_layer: bool) -> Conversion:
    """Return the conversion of a dense family to a container, by default to the family's first that fits.

    Args:
        model_type: Model type of the dense family.
        to: Model type of the container, or None for the default.
        every_layer: Whether the MLPs of all layers become experts.

    Raises:
        UpcycleError: If the family is not dense or not known, or the container cannot compute what it does.
    """
    found = [conversion for conversion in CONVERSIONS if conversion.source.model_type == model_type]
    if not found:
        families = {conversion.source.model_type for conversion in CONVERSIONS}
        raise UpcycleError(
            f"upcycle: no stock MoE family is known to compute what `{model_type}` does; "
            f"{nearest(model_type, families)}"
        )
    if to is None:
        fitting = [conversion for conversion in found if every_layer or conversion.container.chooses_layers]
        return (fitting or found)[0]
    for conversion in found:
        if conversion.container.model_type == to:
            return conversion
    choices = " or ".join(f"`{conversion.container.model_type}`" for conversion in found)
    reasons = INEXACT | {conversion.container.model_type: conversion.container.needs for conversion in CONVERSIONS}
    if to not in reasons:
        raise UpcycleError(
            f"upcycle: `{to}` is not known to compute what `{model_type}` does: take {choices}; of all containers, "
            f"{nearest(to, {conversion.container.model_type for conversion in CONVERSIONS})}"
        )
    raise UpcycleError(f"upcycle: `{to}` cannot compute what `{model_type}` does: {reasons[to]}; take {choices}")
