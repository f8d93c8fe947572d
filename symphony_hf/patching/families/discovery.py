"""Find the routers of any model from its classes."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from symphony_hf.compat import supported_range
from symphony_hf.errors import UnsupportedModelError, nearest

from .contract import RouterContract
from .entries import entry_of
from .inspection import inspect_router
from .probe import full_shape
from .substitution import linear_of

_ROUTER_CLASS = re.compile(r"(Router|Gating|MoEGate|MoeGate|MoEV1Gate|TopKGate)$")


@dataclass(frozen=True)
class FoundRouter:
    """A router in its model.

    Attributes:
        name: Module name in the model.
        module: The router.
        contract: How to run it and to read its outputs.
        owner: The innermost model whose forward runs it, with its layers: the decoder stack.
        layer: Index of its decoder layer.
    """

    name: str
    module: nn.Module
    contract: RouterContract
    owner: nn.Module
    layer: int


def find_routers(model: nn.Module) -> list[FoundRouter]:
    """Find every router of a model and of the models nested in it.

    The classes say which modules are routers, since transformers records their logits. A block that is recorded
    in their place, and a model that records none, is searched for routers by the names of classes and modules. What
    each one is in truth is found by running it.

    Args:
        model: Any model of transformers.

    Raises:
        UnsupportedModelError: If there is none, or one cannot be patched.
    """
    modules = dict(model.named_modules())
    found = look_at_routers(model, modules, _router_names(modules))
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModelError(
            f"{family}: no router found in {type(model).__name__}: it is dense, or its gates are not of transformers: "
            f"for `nn.Linear` gates give `routers=` a pattern of their names. {supported_range()}"
        )
    return found


def look_at_routers(
    model: nn.Module,
    modules: dict[str, nn.Module],
    names: Iterable[tuple[str, nn.Module]],
    top_k: int | None = None,
) -> list[FoundRouter]:
    """Read the contracts of named modules, inspecting one of each kind.

    Args:
        model: Any model.
        modules: Its own, by name.
        names: (name, owner) of each router.
        top_k: Experts chosen per token, where the user says so.

    Raises:
        UnsupportedModelError: If one cannot be patched.
    """
    contracts: dict[Any, RouterContract] = {}
    found = []
    for place, (name, owner) in enumerate(names):
        router = modules[name]
        key = _likeness(modules, name)
        if key not in contracts:
            contracts[key] = inspect_router(name, router, modules, top_k)
        contract = replace(contracts[key], image_tokens=_image_tokens(name, router))
        found.append(FoundRouter(name, router, contract, owner, layer_number(name, place)))
    _check_untied(model, found)
    return found


def _image_tokens(name: str, router: nn.Module) -> bool | None:
    blocks = entry_of(type(router)).image_tokens
    return next((blocks[part] for part in name.split(".") if part in blocks), None)


def _check_untied(model: nn.Module, found: list[FoundRouter]) -> None:
    """Refuse routers with a shared weight, as of an encoder and a decoder: their graphs would differ."""
    num_uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for router in found:
        if num_uses[id(linear_of(router.module, router.contract.linear).weight)] > 1:
            raise UnsupportedModelError(
                f"{type(router.module).__name__} `{router.name}`: it shares its weight with another module, and "
                "a graph of its own would part the two"
            )


def of_layers(found: list[FoundRouter], layers: tuple[int, ...] | None, model: nn.Module) -> list[FoundRouter]:
    """Return the routers of the wanted layers.

    Raises:
        UnsupportedModelError: If a wanted layer has none.
    """
    if layers is None:
        return found
    known = {router.layer for router in found}
    for layer in layers:
        if layer not in known:
            hint = nearest(str(layer), {str(number) for number in known})
            raise UnsupportedModelError(f"{type(model).__name__}: layer {layer} of `layers` has no router; {hint}")
    return [router for router in found if router.layer in layers]


def _router_names(modules: dict[str, nn.Module]) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield (name, owner) of each router, in the order of the modules."""
    owners = {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}
    owner_by_name = {name: owner_of(name, owners) for name in modules if name not in owners}
    owner_by_name = {name: owner for name, owner in owner_by_name.items() if owner is not None}
    declared = {name for name, owner in owner_by_name.items() if _is_declared(owner, name, modules[name])}
    called_so = {name for name in owner_by_name if _looks_like_router(modules, name)}
    blocks = {name for name in declared if any(other.startswith(name + ".") for other in declared | called_so)}
    for name, owner in owner_by_name.items():
        in_block = any(name.startswith(block + ".") for block in blocks)
        found_by_class = name in called_so and (in_block or not _router_recorders(owner))
        if name in declared - blocks or found_by_class:
            yield name, owner


def _looks_like_router(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module is a router by its class, or a plain linear map by its name beside `experts`."""
    module = modules[name]
    if isinstance(getattr(module, "contract", None), RouterContract):
        return True  # patched already, in a model nested in this one
    if type(module) is not nn.Linear:
        return bool(_ROUTER_CLASS.search(type(module).__name__))
    parent, _, own_name = name.rpartition(".")
    return own_name in ("gate", "router") and "experts" in modules[parent]._modules


def owner_of(name: str, owners: dict[str, Any]) -> Any:
    """Return the innermost owner above a module name; None without one."""
    end = name.rfind(".")
    while end > 0:
        if name[:end] in owners:
            return owners[name[:end]]
        end = name.rfind(".", 0, end)
    return owners.get("")


def _is_declared(owner: PreTrainedModel, name: str, module: nn.Module) -> bool:
    for recorder in _router_recorders(owner):
        in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
        if in_layer and isinstance(module, recorder.target_class):
            return True
    return False


def _router_recorders(owner: PreTrainedModel) -> list[OutputRecorder]:
    declared: Any = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = []
    for entry in declared if isinstance(declared, list) else [declared]:
        # A bare class means index 1, as transformers reads it.
        recorder = entry if isinstance(entry, OutputRecorder) else OutputRecorder(entry, index=1)
        if isinstance(recorder.target_class, type):
            recorders.append(recorder)
    return recorders


def _likeness(modules: dict[str, nn.Module], name: str) -> tuple[Any, ...]:
    """Return a key that routers share which compute the same in equal blocks, so that one of them is inspected."""
    router, block = modules[name], modules.get(name.rpartition(".")[0])
    tensors = [*router.named_parameters(), *router.named_buffers()]
    shapes = tuple((tensor_name, full_shape(tensor), tensor.dtype) for tensor_name, tensor in tensors)
    # A patched router has its contract already, and keeps it.
    contract = id(getattr(router, "contract", None))
    return type(router), type(block), shapes, _settings_of(router), _settings_of(block), contract


def _settings_of(module: nn.Module | None) -> tuple[Any, ...]:
    values = {} if module is None else vars(module)
    return tuple(sorted((name, value) for name, value in values.items() if isinstance(value, int | float | str)))


def layer_number(name: str, place: int) -> int:
    """Return the first number in a module name such as `model.layers.3.mlp.gate`, or the router's index without one."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number else place
