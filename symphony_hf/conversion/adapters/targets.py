"""LoRA targets of a model: the linear layers of its attention, and its experts."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from symphony_hf.conversion.inspection.parts import Anatomy, Part
from symphony_hf.conversion.inspection.tensors import bare_name, base_of, held_tensors
from symphony_hf.errors import SymphonyWarning, UnsupportedModelError
from symphony_hf.patching.families.discovery import find_routers
from symphony_hf.patching.symphonize import is_symphonized, symphony_routers


def is_end_of(name: str, end: str) -> bool:
    """Return whether PEFT matches an entry of `target_modules` or `target_parameters` with this name."""
    return name == end or name.endswith(f".{end}")


def shortest_ends(
    wanted: Iterable[str], names: Collection[str], matches: Callable[[str, str], bool] = is_end_of, parts: int = 1
) -> list[str]:
    """Return the shortest dotted suffixes that match all wanted names and no others.

    `matches` says whether PEFT matches a name with a suffix; for `modules_to_save` it ignores dots. `parts` is the
    minimum number of parts of a suffix, for readability.
    """
    wanted = set(wanted)
    others = [name for name in names if name not in wanted]
    unique: dict[str, bool] = {}
    ends = set()
    for name in sorted(wanted):
        pieces = name.split(".")
        for count in range(min(parts, len(pieces)), len(pieces) + 1):
            end = ".".join(pieces[-count:])
            if end not in unique:
                unique[end] = not any(matches(other, end) for other in others)
            if unique[end]:
                ends.add(end)
                break
        else:
            ends.add(name)  # its whole name is a suffix of another: PEFT cannot tell the two apart
    return sorted(ends)


_CHOOSES_POSITIONS = re.compile("Indexer")
"""Modules of sparse attention that select positions by a top-k, which has no gradient."""


@dataclass(frozen=True)
class ExpertTargets:
    """LoRA targets in a model's experts.

    Attributes:
        parameters: Name suffixes of stacked weights, for `target_parameters`.
        modules: Name suffixes of the linear layers of separate experts, for `target_modules`.
        is_packed: Whether stacked weights are packed in 4 bits.
    """

    parameters: list[str]
    modules: list[str]
    is_packed: bool


def attention_targets(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Return name suffixes of the attention's linear layers in the decoder stacks that have routers.

    Raises:
        UnsupportedModelError: If there are none.
    """
    ends = shortest_ends(_attention_maps(model, anatomy), anatomy.modules)
    lost = taken_for_experts(model, ends)
    if lost:
        warnings.warn(
            f"the attention's {', '.join(lost)} get no LoRA: PEFT mistakes such names for experts' weights of "
            "older checkpoints",
            SymphonyWarning,
            stacklevel=3,
        )
    kept = [end for end in ends if end not in lost]
    if not kept:
        raise UnsupportedModelError(
            f"lora_config: {family_of(model)}: no linear map was found in its attention: give attention=False, and "
            "what LoRA is to be put on as target_modules=[...]"
        )
    return kept


def expert_targets(model: nn.Module, anatomy: Anatomy) -> ExpertTargets:
    """Return the LoRA targets in the experts. Raises UnsupportedModelError if PEFT cannot address their weights."""
    held = {bare_name(tensor.name): tensor for tensor in held_tensors(model) if ".lora_" not in tensor.name}
    experts = {name: tensor for name, tensor in held.items() if anatomy.part_of(tensor) is Part.EXPERTS}
    stacked = {name: tensor for name, tensor in experts.items() if len(tensor.shape) == 3}
    maps = {path for path in (name.rpartition(".")[0] for name in experts) if _is_linear_map(anatomy.modules[path])}
    if not stacked and not maps:
        shapes = sorted({tensor.shape for tensor in experts.values()})
        raise UnsupportedModelError(
            f"lora_config: {family_of(model)}: LoRA on experts needs each to be of nn.Linear, or all to be stacked in "
            f"parameters of shape (experts, ..., ...); here they have the shapes {shapes}: give experts=False"
        )
    return ExpertTargets(
        parameters=shortest_ends(stacked, held, parts=2),
        modules=shortest_ends(maps, anatomy.modules),
        is_packed=any(tensor.quant_state is not None for tensor in stacked.values()),
    )


def in_chosen_layers(model: nn.Module, ends: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Return the entries of `target_parameters` that match what `ends` match, in the layers that settings choose.

    A parameter is left out where PEFT would leave out a module of its name, or the module that holds it.

    Args:
        model: Model with adapters or without.
        ends: Entries of `target_parameters`.
        settings: Settings of LoraConfig that choose among `target_modules`, such as `layers_to_transform`.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [bare_name(held.name) for held in held_tensors(model) if ".lora_" not in held.name]
    holders = {name: name.rpartition(".")[0] for name in names if any(is_end_of(name, end) for end in ends)}
    # By the last parts of their names, since PEFT takes a module that is listed by its whole name in any layer.
    leaves = {name.rpartition(".")[2] for pair in holders.items() for name in pair}
    config: Any = LoraConfig(target_modules=leaves, **settings)
    left = [
        name for name, *more in holders.items() if all(check_target_module_exists(config, n) for n in (name, *more))
    ]
    return shortest_ends(left, names, parts=2)


def taken_for_experts(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """Return the entries of `target_modules` that PEFT would mistake for weights of experts.

    Adapters of transformers 4 name each expert's linear layers; PEFT replaces these names by the stacked weights, going
    by the last part of a name (such as `gate_proj`) whatever it belongs to.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = []
    for end in ends:
        config: Any = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, base_of(model), None)
        except ValueError:  # it expects the other layers of an expert too
            taken.append(end)
            continue
        if set(config.target_modules) != {end}:
            taken.append(end)
    return taken


def family_of(model: nn.Module) -> str:
    """Return a model's type, for error messages."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _attention_maps(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    """Yield names of linear layers in the attention of the stacks with routers, and so not of a vision tower."""
    stacks = set(map(id, _stacks_with_routers(model)))
    for name, module in anatomy.modules.items():
        if not _is_linear_map(module) or ".lora_" in name:
            continue
        paths, owners = [], []
        for path, owner in anatomy.owners(name):
            paths.append(path)
            owners.append(owner)
        if any(path in anatomy.routers for path in (name, *paths)):
            continue  # JetMoE has some in its attention
        if any(_CHOOSES_POSITIONS.search(type(owner).__name__) for owner in owners):
            continue
        if any(anatomy.is_attention(owner) for owner in owners) and any(id(owner) in stacks for owner in owners):
            yield name


def _stacks_with_routers(model: nn.Module) -> list[nn.Module]:
    if is_symphonized(model):
        return [router.stack.owner for _, router in symphony_routers(model) if router.stack is not None]
    return [router.owner for router in find_routers(model)]


def _is_linear_map(module: nn.Module) -> bool:
    """Return whether a module is torch's `nn.Linear` or a quantized one; subclasses in families compute more."""
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")
