"""Assignment of parameters to parts of a model, by its structure and its classes."""

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from symphony_hf.errors import UnsupportedModelError
from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.discovery import find_routers
from symphony_hf.patching.symphonize import is_symphonized, symphony_routers

from .tensors import HeldTensor, bare_name, held_tensors


class Part(str, enum.Enum):
    """Parts of a model, in the order of the tables."""

    EMBEDDINGS = "embeddings and head"
    ATTENTION = "attention"
    MIXERS = "other token mixers"
    ROUTERS = "routers"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared experts"
    DENSE_MLPS = "dense MLPs"
    NORMS = "norms"
    VISION = "vision"
    AUDIO = "audio"
    PROJECTOR = "projector"
    GRAPHS = "graphs"
    OTHERS = "others"


@dataclass(frozen=True)
class Routing:
    """Number of experts of a router, and number that each token selects."""

    num_experts: int
    top_k: int

    @classmethod
    def of(cls, contract: RouterContract) -> "Routing":
        return cls(contract.num_experts, contract.top_k)


_ATTENTION = re.compile(r"Attention|MLA$")
_MIXER = re.compile(r"Mamba|DeltaNet|ShortConv|Mixer")
_MLP = re.compile(r"MLP|Mlp|FeedForward|FFN|DenseActDense")
_ROUTER = re.compile(r"(Router|Gating)$")
_TOWERS = (("vision", Part.VISION), ("audio", Part.AUDIO))


class Anatomy:
    """Parts of a model: plain, symphonized, adapted by PEFT, quantized, or on the meta device.

    Names are those of the bare model, without what PEFT and parametrizations add to them.

    Args:
        model: Model of transformers, wrapped by PEFT or not.

    Attributes:
        modules: Modules of the model by name.
        routers: Routing of each router by name; empty if no router is found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if not type(module).__module__.startswith("peft."):
                self.modules.setdefault(bare_name(name), module)
        self.routers = _routings(model)
        self._blocks = {name.rpartition(".")[0]: routing for name, routing in self.routers.items()}
        self._attention = tuple({kind for module in self.modules.values() for kind in _recorded_attention(module)})
        models = [module for module in self.modules.values() if isinstance(module, PreTrainedModel)]
        self._heads = {id(model.get_output_embeddings()) for model in models}
        self._towers = {kind: part for model in models for kind, part in _tower_configs(model.config)}
        self._composites = {type(model.config) for model in models if any(_tower_configs(model.config))}
        self._expert_modules = {
            bare_name(held.name).rpartition(".")[0]
            for held in held_tensors(model)
            if len(held.shape) == 3 and held.shape[0] > 1 and self._block_above(bare_name(held.name)) is not None
        }

    def part_of(self, held: HeldTensor) -> Part:
        """Return the part that a parameter or a graph belongs to."""
        owners = self.owners(held.name)
        path, owner = owners[0]
        if any(isinstance(module, ExpertGraph) for _, module in owners):
            return Part.GRAPHS
        if self._is_of_router(owners, held):
            return Part.ROUTERS
        if self._is_of_experts(owners, held):
            return Part.EXPERTS
        for kind in _config_types(owners):
            if kind in self._towers:
                return self._towers[kind]
        if isinstance(owner, nn.Embedding) or id(owner) in self._heads:
            return Part.EMBEDDINGS
        if "Norm" in type(owner).__name__:
            return Part.NORMS
        if next(_config_types(owners), None) in self._composites:
            return Part.PROJECTOR
        if any(self.is_attention(module) for _, module in owners):
            return Part.ATTENTION
        if "shared" in path or self._is_beside_experts(owners):
            return Part.SHARED_EXPERTS
        if any(_is_called(module, _MIXER) for _, module in owners):
            return Part.MIXERS
        return Part.DENSE_MLPS if any(_is_called(module, _MLP) for _, module in owners) else Part.OTHERS

    def owners(self, name: str) -> list[tuple[str, nn.Module]]:
        """Return (name, module) of all modules around a parameter or module, from the inside out."""
        found, path = [], bare_name(name)
        while path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                found.append((path, self.modules[path]))
        return found

    def is_attention(self, module: nn.Module) -> bool:
        """Return whether transformers records a module's attention weights, or its class is named after attention."""
        return isinstance(module, self._attention) or _is_called(module, _ATTENTION)

    def routing_of(self, name: str) -> Routing | None:
        """Return the routing of the expert that a parameter belongs to; None if the model has no known router."""
        block = self._block_above(bare_name(name))
        if block is not None:
            return self._blocks[block]
        # A layer without a known router, which looks experts up by the token id: it selects as many as the others.
        return next(iter(self._blocks.values()), None)

    def _block_above(self, name: str) -> str | None:
        return next((path for path, _ in self.owners(name) if path in self._blocks), None)

    def _is_of_router(self, owners: list[tuple[str, nn.Module]], held: HeldTensor) -> bool:
        path = owners[0][0]
        if path in self._blocks and held.shape == (self._blocks[path].num_experts,):
            return True  # a bias for the selection
        return any(name in self.routers or _is_called(module, _ROUTER) for name, module in owners)

    def _is_of_experts(self, owners: list[tuple[str, nn.Module]], held: HeldTensor) -> bool:
        paths = [path for path, _ in owners]
        if "shared" in held.name or "Norm" in type(owners[0][1]).__name__:
            return False
        if paths[0] in self._blocks and len(held.shape) < 3:
            return False  # a bias of the block
        return any(path in self._expert_modules or path.rpartition(".")[2] == "experts" for path in paths)

    def _is_beside_experts(self, owners: list[tuple[str, nn.Module]]) -> bool:
        """Return whether a parameter is in a router's block, if the block is not a whole decoder layer."""
        block = next((module for path, module in owners if path in self._blocks), None)
        return block is not None and not any(self.is_attention(module) for module in block.modules())


def _is_called(module: nn.Module, pattern: re.Pattern[str]) -> bool:
    """Return whether a class name matches; decoder layers do not, since they may be named after their content."""
    name = type(module).__name__
    return not name.endswith("DecoderLayer") and bool(pattern.search(name))


def _routings(model: nn.Module) -> dict[str, Routing]:
    if is_symphonized(model):
        found: Any = [(name, router.contract) for name, router in symphony_routers(model)]
    else:
        try:
            found = [(router.name, router.contract) for router in find_routers(model)]
        except UnsupportedModelError:
            return {}
    return {bare_name(name): Routing.of(contract) for name, contract in found}


def _recorded_attention(module: nn.Module) -> Iterator[type[nn.Module]]:
    declared: Any = (getattr(module, "_can_record_outputs", None) or {}).get("attentions", [])
    for entry in declared if isinstance(declared, list) else [declared]:
        kind = entry.target_class if isinstance(entry, OutputRecorder) else entry
        if isinstance(kind, type):
            yield kind


def _tower_configs(config: PreTrainedConfig, tower: Part | None = None) -> Iterator[tuple[type, Part]]:
    """Yield (class, part) of each config of a vision or audio tower inside a model's config."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            part = tower or next((part for word, part in _TOWERS if word in name), None)
            if part is not None:
                yield type(inner), part
            yield from _tower_configs(inner, part)


def _config_types(owners: list[tuple[str, nn.Module]]) -> Iterator[type]:
    """Return the config classes of the models among the owners, from the inside out."""
    return (type(module.config) for _, module in owners if isinstance(module, PreTrainedModel))
