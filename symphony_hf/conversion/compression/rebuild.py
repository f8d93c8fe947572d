"""A model rebuilt with another config: fewer experts, each made of some of the old ones, or fewer a token."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_hf.errors import UnsupportedModelError

from .layers import ExpertLayer, expert_layers

_NUM_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_TOP_K = re.compile(r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts")


@dataclass(frozen=True)
class NewExpert:
    """What an expert of the smaller model is made of.

    Attributes:
        members: Numbers of old experts.
        shares: Of each in the mean; they sum to 1.
    """

    members: tuple[int, ...]
    shares: tuple[float, ...]


def kept(numbers: Sequence[int]) -> list[NewExpert]:
    """Experts that stay as they are."""
    return [NewExpert((number,), (1.0,)) for number in numbers]


def with_fewer_experts(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], plan: Sequence[list[NewExpert]]
) -> PreTrainedModel:
    """The model with new experts in each layer, and router rows to match.

    What depends on the number of experts is found by building the smaller model without weights: the tensors whose
    shape differs. An expert that is a mean has the mean of its members' weights, and its router row, with biases that
    go with it, the same mean of theirs.

    Args:
        model: Plain. It is left as it is; tensors that do not change are shared with it.
        layers: Its own.
        plan: The new experts of each, as many in every layer.

    Raises:
        UnsupportedModelError: If the config does not say how many experts there are, or something else than experts
            and routers depends on it.

    Source: HC-SMoE (arXiv 2410.08589) for the means. Deviation: there the router keeps a row for each old expert and
    sends several to the same new one, which no stock checkpoint can say; here a cluster has one row, the mean of its
    members' weighted by load. That is the first order of the logarithm of the sum of their exponentials, which would
    be the cluster's exact logit, but for a constant.
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
            place = next((p for p, layer in enumerate(layers) if name.startswith(layer.prefix)), None)
            dim = _experts_dim(tuple(tensor.shape), wanted[name], layers[0].num_experts, num_experts)
            if place is None or dim is None:
                left[name] = f"{tuple(tensor.shape)} would be {wanted[name]}"
            else:
                state[name] = _reduced(tensor, dim, plan[place])
    if left or state.keys() != wanted.keys():
        raise UnsupportedModelError(
            f"{type(model).__name__}: with {num_experts} experts other tensors than those of its routers and experts "
            f"change: {left or sorted(wanted.keys() - state.keys())}"
        )
    return _filled(model, smaller, state, num_experts, layers[0].top_k)


def with_top_k(model: PreTrainedModel, layers: Sequence[ExpertLayer], top_k: int) -> PreTrainedModel:
    """The model with another number of experts a token, and the same weights, which are shared.

    Raises:
        UnsupportedModelError: If the config does not say how many a token chooses.
    """
    config = _changed(model, _TOP_K, layers[0].top_k, top_k, "experts a token")
    return _filled(model, _empty(model, config), model.state_dict(), layers[0].num_experts, top_k)


def _changed(model: PreTrainedModel, pattern: re.Pattern[str], old: int, new: int, what: str) -> PreTrainedConfig:
    config, found = copy.deepcopy(model.config), False
    for holder in _configs(config):
        for name, value in holder.to_dict().items():
            if pattern.fullmatch(name) and type(value) is int and value == old:
                setattr(holder, name, new)
                found = True
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no setting of its config is its number of {what}, {old}, by a name that is known"
        )
    return config


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _configs(inner)


def _empty(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(config).eval()


def _experts_dim(old: tuple[int, ...], new: tuple[int, ...], old_number: int, new_number: int) -> int | None:
    """The one dimension that changes, if it is that of the experts."""
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
    smaller.load_state_dict(state, assign=True)
    for name, buffer in list(smaller.named_buffers()):
        if buffer.is_meta:  # it is in no checkpoint, such as the frequencies of rotary positions
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
