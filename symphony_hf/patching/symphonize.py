"""symphonize and unsymphonize: patch a model's routers in place, and restore them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.graph_files import match_graphs, read_graphs
from symphony_hf.checkpoints.saving import own_config
from symphony_hf.config import GRAPHS, SymphonyConfig, settings_of
from symphony_hf.errors import PatchError, UnsupportedModelError
from symphony_hf.patching.families.discovery import FoundRouter, find_routers, layer_number
from symphony_hf.patching.families.named_gates import routers_of
from symphony_hf.patching.families.substitution import linear_of

from .attachment import attach, check_balance_scope, detach, settle, tracker_of
from .correction_bias import check_correction_biases
from .expert_graph import ExpertGraph, active_graph, is_adapted, put_aside
from .no_effect import warn_of_no_effect
from .router import ATTACHED, SymphonyRouter, check_swappable, swap_class, symphony_router_class
from .router_gradient_checks import check_graph_of_neighbours, check_router_gradient
from .self_check import check_routers

Model = TypeVar("Model", bound=nn.Module)


def symphonize(
    model: Model,
    config: SymphonyConfig | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    **overrides: Any,
) -> Model:
    """Route a MoE model through the graph of its experts, in place.

    Unless `graph` is a path, the graph starts as the identity, and the model computes bit for bit what it did until
    training moves the graph. Weights, experts and checkpoint names stay as they are: each router gains a child
    `symphony`, which holds the graph and its number of updates.

    Args:
        model: A MoE model of transformers, or one with a MoE inside, such as LLaVA; with `routers`, any module.
        config: Settings; the defaults when None.
        preset: Name of settings that go together, in place of `config`: `paper` or `dense_gradient`; see
            `symphony_hf.config.PRESETS`.
        **overrides: Single settings, such as `strength=0.5`.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If no router is found, or one is of a kind that cannot be patched.
        PatchError: If the model is already symphonized, or wrapped by PEFT or another wrapper.
        ConfigError: If a setting or preset is unknown, a value is out of range, or the model cannot be balanced in its
            `balance_scope`.
        GraphError: If `graph` is a path without a usable graph for every router.

    Source: arXiv 2510.16411.
    """
    settings = settings_of(config, preset, overrides)
    _check_patchable(model, settings)
    found = routers_of(model, settings)
    check_balance_scope(model, found, settings)
    check_router_gradient(found, settings)
    check_graph_of_neighbours(found, settings, has_path=settings.graph not in GRAPHS)
    check_correction_biases(model, found, settings)
    adjacencies = None
    if settings.graph not in GRAPHS:
        routers = [(router.name, router.contract.num_experts) for router in found]
        adjacencies = match_graphs(read_graphs(settings.graph), routers, settings.graph)
        settings = dataclasses.replace(settings, graph="ema")
    with torch.device("cpu"):  # also inside `with torch.device("meta")`
        check_routers(found, settings)
    for router in found:
        check_swappable(router.name, router.module)
    # Everything was checked; from here on nothing is refused.
    graphs = [patch_router(router, settings) for router in found]
    if isinstance(model, PreTrainedModel):
        own_config(model)
    attach(model, found, settings.to_dict())
    if adjacencies is not None:
        for graph, adjacency_EE in zip(graphs, adjacencies, strict=True):
            with torch.no_grad():
                graph.adjacency.copy_(adjacency_EE)
    warn_of_no_effect(found, settings, tracker_of(model).checks, has_path=adjacencies is not None)
    return model


def _check_patchable(model: nn.Module, settings: SymphonyConfig) -> None:
    if not isinstance(model, nn.Module):
        raise PatchError(
            f"symphonize: expected a model, got {type(model).__name__}: load it first, by "
            "`AutoModelForCausalLM.from_pretrained`"
        )
    if is_adapted(model):
        raise PatchError(
            f"symphonize: {type(model).__name__} is wrapped by PEFT: symphonize the base model first, then "
            "`get_peft_model` with modules_to_save=['symphony']"
        )
    if not isinstance(model, PreTrainedModel) and settings.routers is None:
        raise PatchError(
            f"symphonize: expected a transformers model, got {type(model).__name__}: symphonize before wrapping or "
            "compiling; for a model of your own give `routers=` a pattern of its gates' names"
        )
    inner = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    if not isinstance(model, PreTrainedModel) and inner:
        raise PatchError(
            f"symphonize: {type(model).__name__} is wrapped around a transformers model: symphonize that, "
            f"`{inner[0]}`, before it is wrapped or compiled"
        )
    if is_symphonized(model):
        raise PatchError("symphonize: the model is already symphonized; `unsymphonize(model)` first to change settings")
    if isinstance(model, PreTrainedModel):
        _check_graphs_arrived(model)
        check_nothing_bypasses(model)


def _check_graphs_arrived(model: nn.Module) -> None:
    """Raise PatchError for a model whose config says that it has graphs, when it has none."""
    if getattr(getattr(model, "config", None), "symphony", None) is not None:
        raise PatchError(
            f"{type(model).__name__} is of a Symphony checkpoint, but its graphs were not loaded: it was loaded before "
            "`import symphony_hf`. Import symphony_hf first, then load it again; or `del model.config.symphony` to go "
            "on without these graphs"
        )


def check_nothing_bypasses(model: PreTrainedModel) -> None:
    """Refuse what reads a router's weight itself, past any patch.

    Raises:
        PatchError: If the model runs the Hub's kernels, or MXFP4 experts.
    """
    if getattr(model, "use_kernels", False):
        raise PatchError("symphonize: kernels of the Hub read the router's weight themselves: use use_kernels=False")
    quantization: Any = getattr(model.config, "quantization_config", None) or {}
    settings = quantization if isinstance(quantization, dict) else vars(quantization)
    method = settings.get("quant_method")
    if str(getattr(method, "value", method)) == "mxfp4":
        raise PatchError(
            "symphonize: MXFP4 experts read the router's weight themselves: load with "
            "quantization_config=Mxfp4Config(dequantize=True), or fold the graph first"
        )


def patch_router(router: FoundRouter, config: SymphonyConfig) -> ExpertGraph:
    """Make one router a Symphony router, and return its graph. It observes nothing until `attach` gives it a stack."""
    module = router.module
    linear: Any = linear_of(module, router.contract.linear)
    device = linear.weight.device
    if linear.weight.is_meta and torch.get_default_device().type != "meta":
        # accelerate keeps an offloaded weight on meta between forwards; the graph is small, and stays on the device.
        # `init_empty_weights` makes parameters alone on meta: the graph is a buffer, which no loader moves from there.
        device = getattr(getattr(linear, "_hf_hook", None), "execution_device", "cpu")
    graph = ExpertGraph(router.contract.num_experts, router.contract.top_k, config, device).train(module.training)
    module.symphony = graph
    module.contract = router.contract  # type: ignore[assignment]
    swap_class(module, symphony_router_class(type(module)))
    return graph


def unpatch_router(router: SymphonyRouter) -> None:
    """Restore one Symphony router's own class."""
    swap_class(router, router.base_class)  # type: ignore[arg-type]
    del router.symphony
    for name in ATTACHED:
        router.__dict__.pop(name, None)


def is_symphonized(model: nn.Module) -> bool:
    """Return whether a model routes through expert graphs.

    Args:
        model: Any model, wrapped or not.
    """
    return any(isinstance(module, SymphonyRouter) for module in model.modules())


def symphony_routers(model: nn.Module) -> Iterator[tuple[str, SymphonyRouter]]:
    """Yield (module name, router) of each Symphony router.

    Raises:
        PatchError: If there is none.
    """
    if not is_symphonized(model):
        _check_graphs_arrived(model)
        raise PatchError(f"{type(model).__name__} is not symphonized: call `symphonize(model)` first")
    aside = put_aside(model.modules())
    for name, module in model.named_modules():
        if isinstance(module, SymphonyRouter) and id(module) not in aside:
            yield name, module


def all_routers(model: nn.Module) -> list[FoundRouter]:
    """Return all routers of a model, with a graph or without, in module order; also those that its user named.

    Raises:
        UnsupportedModelError: If it has no router, or one of an unknown kind.
    """
    named: dict[str, Any] = dict(symphony_routers(model)) if is_symphonized(model) else {}
    found = {
        name: FoundRouter(name, router, router.contract, getattr(router.stack, "owner", model), layer_number(name, row))
        for row, (name, router) in enumerate(named.items())
    }
    try:
        others = find_routers(model)
    except UnsupportedModelError:
        if not found:
            raise
        others = []  # an unknown model whose user named its routers
    aside = put_aside(model.modules())
    found |= {router.name: router for router in others if id(router.module) not in aside}
    return [found[name] for name, _ in model.named_modules() if name in found]


def check_whole(model: nn.Module, what: str) -> None:
    """Raise PatchError, which begins with `what`, for a part of a Symphony model or a wrapper around one: the model's
    hooks and settings would be left behind."""
    if "_symphony_tracker" not in model.__dict__:
        raise PatchError(
            f"{what}: {type(model).__name__} is a part of the model that was symphonized, or wrapped around it: give "
            "the model that was symphonized"
        )


def expert_graphs(model: nn.Module) -> dict[str, Tensor]:
    """Return the co-selection graph of each router.

    Args:
        model: A symphonized model, a part of one, or a wrapper around one.

    Returns:
        Router's module name -> its adjacency, a copy: symmetric, non-negative; the diagonal is each expert's share
        of tokens, the rest how often two experts are chosen together. Shape: (num_experts, num_experts), float32.

    Raises:
        PatchError: If the model is not symphonized, or ZeRO-3 has partitioned a learned graph.

    Under FSDP2 a learned graph is gathered, so every rank must call this.
    """
    settle(model)
    graphs = ((name, active_graph(router.symphony)) for name, router in symphony_routers(model))
    return {name: _whole(name, graph.symmetrized().detach()).clone() for name, graph in graphs}


def _whole(name: str, tensor: Any) -> Tensor:
    if tensor.dim() != 2:
        raise PatchError(
            f"expert_graphs: ZeRO-3 has partitioned the learned graph of `{name}`: read it on every rank inside "
            "`deepspeed.zero.GatheredParameters(list(model.parameters()))`"
        )
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unsymphonize(model: Model) -> Model:
    """Remove the graphs, in place: restore the base model's classes, names and routing, with the same weights.

    Args:
        model: The model that was symphonized, not wrapped.

    Returns:
        The same model.

    Raises:
        PatchError: If the model is not symphonized, is a part of one that is, or has adapters.
    """
    routers = [router for _, router in symphony_routers(model)]
    if is_adapted(model):
        raise PatchError("unsymphonize: the model has PEFT's adapters in it: `merge_and_unload()` first")
    check_whole(model, "unsymphonize")
    for module in model.modules():
        detach(module)
    for router in routers:
        unpatch_router(router)
    for module in model.modules():
        settings = getattr(module, "config", None)
        if "symphony" in getattr(settings, "__dict__", {}):
            del settings.symphony  # type: ignore[union-attr]
    return model
