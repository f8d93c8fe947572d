"""What LoRA can be put on in a model: the linear maps of its attention, and its experts."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from symphony_hf.conversion.inspection.parts import Anatomy, Part
from symphony_hf.conversion.inspection.tensors import bare_name, held_tensors
from symphony_hf.errors import SymphonyWarning, UnsupportedModelError
from symphony_hf.patching.symphonize import symphony_routers


def is_end_of(name: str, end: str) -> bool:
    """Whether PEFT takes a name of `target_modules` or `target_parameters` for this module or parameter."""
    return name == end or name.endswith(f".{end}")


def shortest_ends(
    wanted: Iterable[str], names: Collection[str], matches: Callable[[str, str], bool] = is_end_of, parts: int = 1
) -> list[str]:
    """The shortest ends of names, at their dots, that match all wanted ones and no other.

    Args:
        wanted: Names of modules, or of parameters.
        names: All of the model.
        matches: Whether PEFT takes an end for a name: for `modules_to_save` it does without regard to dots.
        parts: How many parts of a name an end has at least, so that a reader sees what it is of.
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
            ends.add(name)  # its whole name is another's end: PEFT cannot tell the two apart
    return sorted(ends)


_CHOOSES_POSITIONS = re.compile("Indexer")
"""Modules of sparse attention that choose positions by a top-k, through which no gradient comes."""


@dataclass(frozen=True)
class ExpertTargets:
    """What a model's experts are made of, in the names that PEFT takes.

    Attributes:
        parameters: Ends of the names of stacked weights, for `target_parameters`.
        modules: Ends of the names of linear maps, where each expert has its own, for `target_modules`.
        is_packed: Whether stacked weights are packed in 4 bits.
    """

    parameters: list[str]
    modules: list[str]
    is_packed: bool


def attention_targets(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Ends of the names of the attention's linear maps, in the decoder stacks that have routers.

    Raises:
        UnsupportedModelError: If there are none.
    """
    ends = shortest_ends(_attention_maps(model, anatomy), anatomy.modules)
    lost = taken_for_experts(model, ends)
    if lost:
        warnings.warn(
            f"the attention's {', '.join(lost)} get no LoRA: PEFT takes such names for those of experts' weights in "
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
    """What LoRA on the experts is put on.

    Raises:
        UnsupportedModelError: If PEFT cannot be told of the experts' weights.
    """
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


def taken_for_experts(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """Those of the names for `target_modules` that PEFT would take for weights of experts.

    Adapters of transformers 4 name each expert's linear maps; PEFT puts the stacked weights in their place, by the
    last part of a name (`gate_proj`, say), whatever it was of.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = []
    for end in ends:
        config: Any = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, base_of(model), None)
        except ValueError:  # it misses the other maps of an expert
            taken.append(end)
            continue
        if set(config.target_modules) != {end}:
            taken.append(end)
    return taken


def base_of(model: Any) -> Any:
    """The model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: nn.Module) -> str:
    """A model's type, for error messages."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _attention_maps(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    """Names of the linear maps in the attention of the stacks that have routers; not in a vision tower's, say."""
    stacks = {id(router.stack.owner) for _, router in symphony_routers(model) if router.stack is not None}
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


def _is_linear_map(module: nn.Module) -> bool:
    """An `nn.Linear` of torch, or of a quantization; families' own subclasses compute something else."""
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")
