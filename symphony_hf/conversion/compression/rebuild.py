"""Rebuilding a model with another config: fewer experts, or fewer per token."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_hf.checkpoints.model_class import nested_configs
from symphony_hf.errors import UnsupportedModelError

from .layers import ExpertLayer, expert_layers

_NUM_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_TOP_K = re.compile(r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts")


@dataclass(frozen=True)
class NewExpert:
    """Expert of the smaller model, as a mean of old experts with these shares, which sum to 1."""

    members: tuple[int, ...]
    shares: tuple[float, ...]


def kept(numbers: Sequence[int]) -> list[NewExpert]:
    """Return experts that are kept unchanged."""
    return [NewExpert((number,), (1.0,)) for number in numbers]


def with_fewer_experts(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], plan: Sequence[list[NewExpert]]
) -> PreTrainedModel:
    """Return the model with new experts in each layer, equally many, and matching router rows.

    Tensors that depend on the number of experts are found by building the smaller model without weights and comparing
    shapes. The weights of a new expert, its router row and its biases are the same mean over its members. The plain
    model is unchanged, and shares the tensors that do not change.

    Raises:
        UnsupportedModelError: If the number of experts is not in the config, or tensors other than those of experts and
            routers depend on it.

    Source: HC-SMoE (arXiv 2410.08589) for the means. Deviation: its router keeps a row for each old expert and maps
    several to one new expert, which stock checkpoints cannot express; here a cluster has one row, the load-weighted
    mean of its members' rows. The cluster's exact logit, the logarithm of the sum of its members' exponentials, is at
    least that mean plus the entropy of the shares, with equality where the members' probabilities have these shares.
    The entropy, from 0 to log n for n members, is left out, as most routers have no bias: clusters are selected too
    rarely against experts that are alone.
    """
    num_experts = len(plan[0])
    config = _changed(model, _NUM_EXPERTS, layers[0].num_experts, num_experts, "experts")
    smaller = _empty(model, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    state, left = model.state_dict(), {}
    for name, tensor in state.items():
        if name not in wanted:
            left[name] = "gone"
        elif tuple(tensor.shape) != wanted[name]:
            index = next((i for i, layer in enumerate(layers) if name.startswith(layer.prefix)), None)
            dim = _experts_dim(tuple(tensor.shape), wanted[name], layers[0].num_experts, num_experts)
            if index is None or dim is None:
                left[name] = f"{tuple(tensor.shape)} would be {wanted[name]}"
            else:
                state[name] = _reduced(tensor, dim, plan[index])
    if left or state.keys() != wanted.keys():
        raise UnsupportedModelError(
            f"{type(model).__name__}: with {num_experts} experts other tensors than those of its routers and experts "
            f"change: {left or sorted(wanted.keys() - state.keys())}"
        )
    return _filled(model, smaller, state, num_experts, layers[0].top_k)


def with_top_k(model: PreTrainedModel, layers: Sequence[ExpertLayer], top_k: int) -> PreTrainedModel:
    """Return the model with another top-k and the same, shared weights.

    Raises:
        UnsupportedModelError: If the top-k is not in the config, or tensors depend on it.
    """
    config = _changed(model, _TOP_K, layers[0].top_k, top_k, "experts a token")
    return _filled(model, _empty(model, config), model.state_dict(), layers[0].num_experts, top_k)


def _changed(model: PreTrainedModel, pattern: re.Pattern[str], old: int, new: int, what: str) -> PreTrainedConfig:
    config, found = copy.deepcopy(model.config), False
    for holder in nested_configs(config):
        for name, value in holder.to_dict().items():
            if pattern.fullmatch(name) and type(value) is int and value == old:
                setattr(holder, name, new)
                found = True
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no setting of its config is its number of {what}, {old}, by a name that is known"
        )
    return config


def _empty(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(config).eval()


def _experts_dim(old: tuple[int, ...], new: tuple[int, ...], old_number: int, new_number: int) -> int | None:
    """Return the dimension that changes, if it is the only one and that of the experts."""
    if len(old) != len(new):
        return None
    changed = [dim for dim, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1]]
    return changed[0] if [(old[dim], new[dim]) for dim in changed] == [(old_number, new_number)] else None


def _reduced(tensor: Tensor, dim: int, plan: Sequence[NewExpert]) -> Tensor:
    experts = tensor.movedim(dim, 0)
    return torch.stack([_mean(experts, new) for new in plan]).movedim(0, dim).contiguous()


def _mean(experts: Tensor, new: NewExpert) -> Tensor:
    if len(new.members) == 1:
        return experts[new.members[0]]  # to the bit
    pairs = zip(new.members, new.shares, strict=True)
    return sum((experts[member].double() * share for member, share in pairs), torch.zeros(())).to(experts.dtype)


def _filled(
    model: PreTrainedModel, smaller: PreTrainedModel, state: dict[str, Tensor], num_experts: int, top_k: int
) -> PreTrainedModel:
    try:
        smaller.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: with top-{top_k} of {num_experts} experts tensors change that "
            f"should not: {' '.join(str(error).split())}"
        ) from error
    for name, buffer in list(smaller.named_buffers()):
        if buffer.is_meta:  # not in checkpoints, such as rotary frequencies
            owner, _, own_name = name.rpartition(".")
            smaller.get_submodule(owner)._buffers[own_name] = model.get_buffer(name)
    smaller.tie_weights()
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
    numbers = {(layer.num_experts, layer.top_k) for layer in expert_layers(smaller)}
    if numbers != {(num_experts, top_k)}:
        raise UnsupportedModelError(
            f"{type(model).__name__}: with its config set to top-{top_k} of {num_experts} experts its routers choose "
            f"{sorted(numbers)}: not all of them go by it"
        )
    return smaller
