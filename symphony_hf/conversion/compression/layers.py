"""Expert layers of a model: stacked experts beside a supported router."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.marks import ARCHITECTURE_PREFIX
from symphony_hf.errors import UnsupportedModelError
from symphony_hf.evaluation.checkpoint import ModelUnderTest, load_tokenizer
from symphony_hf.evaluation.windows import check_context, default_block_size
from symphony_hf.patching.families.discovery import FoundRouter, find_routers
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import expert_graphs, is_symphonized

from .settings import TextSettings

_GROUPS = ("num_group", "n_group", "num_expert_group")
"""Names of the number of groups that some routers select first."""


@dataclass(frozen=True)
class ExpertLayer:
    """Router and its experts.

    Attributes:
        block: Name of the module around both; empty for the model itself.
        router: Router as discovered.
        experts: Module with the experts' tensors, each with the experts along its first dimension.
        num_groups: Number of groups of adjacent experts that the router selects first; 1 if it has none.
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
        """Prefix of all names in the block."""
        return f"{self.block}." if self.block else ""


def expert_layers(model: PreTrainedModel) -> list[ExpertLayer]:
    """Find the expert layers of a plain model.

    Raises:
        UnsupportedModelError: If there are none, one has another form, or their numbers of experts differ.
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

    Raises UnsupportedModelError if there are fewer experts, a token selects more, or the groups do not divide the
    number.
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
                f"{num_experts} experts cannot be divided: give a multiple of {layer.num_groups} with at least 2 per "
                f"group, whose selected groups have {layer.top_k} experts"
            )


@dataclass(frozen=True)
class Opened:
    """Loaded model to compress.

    Attributes:
        model: Plain model; the graphs of a Symphony model are folded into its routers.
        tokenizer: Tokenizer of the model, or the given one.
        graphs: Graphs by router name; empty for a plain model.
        layers: Routers and experts.
        block_size: Number of tokens in a window.
        fingerprint: Fingerprint of the checkpoint.
    """

    model: PreTrainedModel
    tokenizer: Any
    graphs: dict[str, Tensor]
    layers: list[ExpertLayer]
    block_size: int
    fingerprint: str


def open_model(settings: TextSettings) -> Opened:
    """Load the checkpoint to compress.

    Raises:
        ConfigError: If there is no checkpoint, its tokenizer is missing, or windows are longer than its context.
        UnsupportedModelError: If it is quantized, has upcycled modules, is more than a language model, has an unknown
            form of experts, or does not fit on one device.
        FoldError: If its graphs smooth scores, which cannot be folded.
    """
    under_test = ModelUnderTest(settings.model, settings.revision, settings.dtype)
    where = f"{settings.command}: `{settings.model}`"
    if getattr(under_test.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{where} is quantized, and packed experts can be neither averaged nor removed: use bfloat16 or "
            "float32 weights, and quantize the result"
        )
    if getattr(under_test.config, "upcycled", None) is not None:
        raise UnsupportedModelError(f"{where} has modules of `upcycle_modules`, for which there is no stock class")
    block_size = settings.block_size or default_block_size([under_test])
    check_context(settings.command, "the text", block_size, block_size, under_test)
    model = under_test.model
    named = [name.removeprefix(ARCHITECTURE_PREFIX) for name in under_test.config.architectures or ()]
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
    return Opened(model, tokenizer, graphs, expert_layers(model), block_size, under_test.fingerprint)
