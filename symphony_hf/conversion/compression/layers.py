"""Where a model's experts are: the layers whose experts are stacked tensors beside a router that we can read."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.saving import ARCHITECTURE_PREFIX
from symphony_hf.errors import UnsupportedModelError
from symphony_hf.evaluation.checkpoint import ModelUnderTest, load_tokenizer
from symphony_hf.evaluation.windows import default_block_size
from symphony_hf.patching.families.discovery import FoundRouter, find_routers
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import expert_graphs, is_symphonized

from .settings import TextSettings

_GROUPS = ("num_group", "n_group", "num_expert_group")
"""What families call the number of groups that a router first chooses among."""


@dataclass(frozen=True)
class ExpertLayer:
    """One router and its experts.

    Attributes:
        block: Module name of what both are in; empty for the model itself.
        router: As discovery found it.
        experts: The module that holds the experts' tensors, each with the experts along its first dimension.
        num_groups: Groups of neighbours that the router first chooses among; 1 where it has none.
    """

    block: str
    router: FoundRouter
    experts: nn.Module
    num_groups: int

    @property
    def num_experts(self) -> int:
        return self.router.contract.num_experts

    @property
    def top_k(self) -> int:
        return self.router.contract.top_k

    @property
    def prefix(self) -> str:
        """Of the names of everything in the block."""
        return f"{self.block}." if self.block else ""


def expert_layers(model: PreTrainedModel) -> list[ExpertLayer]:
    """Find all of them.

    Args:
        model: A plain model, without graphs.

    Raises:
        UnsupportedModelError: If there is none, one has experts of another form, or they are not all alike in number.
    """
    modules = dict(model.named_modules())
    layers = [_layer(router, modules) for router in find_routers(model)]
    numbers = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(numbers) > 1:
        found = ", ".join(f"top-{k} of {experts}" for experts, k in sorted(numbers))
        raise UnsupportedModelError(
            f"{type(model).__name__}: its routers choose {found}: only models with the same number of experts in every "
            "layer can be made smaller"
        )
    return layers


def _layer(router: FoundRouter, modules: dict[str, nn.Module]) -> ExpertLayer:
    block = router.name.rpartition(".")[0]
    experts, contract = modules[block]._modules.get("experts"), router.contract
    where = f"{type(router.module).__name__} `{router.name}`"
    if experts is None:
        raise UnsupportedModelError(
            f"{where}: there is no module `experts` beside it in {type(modules[block]).__name__}"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    stacked = all("." not in name and shape[0] == contract.num_experts for name, shape in shapes.items())
    if not shapes or not stacked or not any(len(shape) == 3 for shape in shapes.values()):
        raise UnsupportedModelError(
            f"{where}: its experts are not stacked tensors of {contract.num_experts} experts each, but {shapes}"
        )
    if len(inspect.signature(type(experts).forward).parameters) != 4:
        raise UnsupportedModelError(
            f"{where}: its {type(experts).__name__} does not take (hidden states, chosen experts, their weights), so "
            "single experts cannot be run"
        )
    linear: Any = linear_of(router.module, contract.linear)
    if linear.weight.shape[0] != contract.num_experts:
        raise UnsupportedModelError(
            f"{where}: it scores {linear.weight.shape[0]} choices for {contract.num_experts} experts with weights"
        )
    groups = next((getattr(router.module, name) for name in _GROUPS if getattr(router.module, name, None)), 1)
    return ExpertLayer(block, router, experts, groups)


def check_number(layers: list[ExpertLayer], num_experts: int, command: str) -> None:
    """Refuse a number of experts that the layers cannot have.

    Args:
        layers: Of the model.
        num_experts: To leave in each.
        command: For the error message.

    Raises:
        UnsupportedModelError: If it is more than there are, less than a token chooses, or does not go into the groups.
    """
    layer = layers[0]
    if num_experts > layer.num_experts:
        raise UnsupportedModelError(f"{command}: {num_experts} experts of {layer.num_experts}: give fewer")
    if num_experts < layer.top_k:
        raise UnsupportedModelError(
            f"{command}: a token chooses {layer.top_k} experts, so {num_experts} are too few: lower that first with "
            "`symphony topk`"
        )
    for layer in layers:
        if layer.num_groups == 1:
            continue
        size, left = divmod(num_experts, layer.num_groups)
        usable = size * getattr(layer.router.module, "topk_group", layer.num_groups)
        # DeepSeek-V3's routers score a group by its two best.
        if left or size < 2 or usable < layer.top_k:
            raise UnsupportedModelError(
                f"{command}: `{layer.router.name}` chooses among {layer.num_groups} groups of experts, and "
                f"{num_experts} experts cannot be so divided: give a multiple of {layer.num_groups}, of 2 or more a "
                f"group, whose chosen groups hold {layer.top_k} experts"
            )


@dataclass(frozen=True)
class Opened:
    """What the commands work on.

    Attributes:
        model: Plain: a Symphony model's graphs are folded into its routers.
        tokenizer: Its own, or the one that was named.
        graphs: By router's name; empty where the model was plain.
        layers: Its routers and experts.
        block_size: Tokens of a window.
        fingerprint: Of the checkpoint.
    """

    model: PreTrainedModel
    tokenizer: Any
    graphs: dict[str, Tensor]
    layers: list[ExpertLayer]
    block_size: int
    fingerprint: str


def open_model(settings: TextSettings) -> Opened:
    """Load a checkpoint.

    Raises:
        ConfigError: If there is none, or its tokenizer is missing.
        UnsupportedModelError: If it is quantized, has upcycled modules, is more than a language model, has experts of a
            form that is not known, or does not fit one device.
        FoldError: If its graphs smooth scores, which no plain router computes.
    """
    subject = ModelUnderTest(settings.model, settings.revision, settings.dtype)
    where = f"{settings.command}: `{settings.model}`"
    if getattr(subject.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{where} is quantized, and packed experts can be neither averaged nor cut: take it in bfloat16 or "
            "float32, and quantize what comes out"
        )
    if getattr(subject.config, "upcycled", None) is not None:
        raise UnsupportedModelError(f"{where} has modules of `upcycle_modules`, for which there is no stock class")
    model = subject.model
    named = [name.removeprefix(ARCHITECTURE_PREFIX) for name in subject.config.architectures or ()]
    if named and type(model).__name__ not in named:
        raise UnsupportedModelError(
            f"{where} is a {named[0]}, of which {type(model).__name__} is a part: the rest would be lost"
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UnsupportedModelError(f"{where} is spread over several devices: give one with room, or hide the GPUs")
    tokenizer = load_tokenizer(settings.tokenizer or settings.model, None if settings.tokenizer else settings.revision)
    graphs = {}
    if is_symphonized(model):
        graphs = expert_graphs(model)
        fold(model)
    block_size = settings.block_size or default_block_size([subject])
    return Opened(model, tokenizer, graphs, expert_layers(model), block_size, subject.fingerprint)
