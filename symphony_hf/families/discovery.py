"""Find the routers of any model from what its classes say about themselves."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ..compat import supported_range
from ..errors import UnsupportedModelError, nearest
from .contract import RouterContract, inspect_router


@dataclass(frozen=True)
class FoundRouter:
    """A router in its model.

    Attributes:
        name: Its module name in the model.
        module: Itself.
        contract: How to read its outputs.
        owner: The innermost model whose forward runs it, with its layers: the decoder stack.
        layer: The number of its decoder layer.
    """

    name: str
    module: nn.Module
    contract: RouterContract
    owner: PreTrainedModel
    layer: int


def find_routers(model: nn.Module, layers: tuple[int, ...] | None = None) -> list[FoundRouter]:
    """Every router that the classes of a model, and of the models nested in it, declare to record.

    Args:
        model: Any model of transformers.
        layers: Numbers of the decoder layers wanted; all when None.

    Raises:
        UnsupportedModelError: If there is none, one cannot be patched, or a wanted layer has none.
    """
    found = [
        FoundRouter(name, module, inspect_router(name, module, logits_place), owner, _layer_number(name, place))
        for place, (name, module, owner, logits_place) in enumerate(_declared_routers(model))
    ]
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModelError(
            f"{family}: no router found in {type(model).__name__}: it is dense, or its routers are of a kind that "
            f"symphony_hf cannot patch yet. {supported_range()}"
        )
    if layers is None:
        return found
    known = {router.layer for router in found}
    for layer in layers:
        if layer not in known:
            hint = nearest(str(layer), {str(number) for number in known})
            raise UnsupportedModelError(f"{type(model).__name__}: layer {layer} of `layers` has no router; {hint}")
    return [router for router in found if router.layer in layers]


def _declared_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, PreTrainedModel, int]]:
    """Yield (name, router, owner, place of its logits), in the order of the modules."""
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in model.named_modules():
        prefixes = (name[:end] for end in _prefix_ends(name))
        owner = next((owners[prefix] for prefix in prefixes if prefix in owners), None)
        if owner is None or module is owner:
            continue
        for recorder in _router_recorders(owner):
            in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
            if in_layer and isinstance(module, recorder.target_class):
                yield name, module, owner, recorder.index
                break


def _prefix_ends(name: str) -> Iterator[int]:
    """Ends of the module names above `name`, innermost first, the root's (0) last."""
    end = name.rfind(".")
    while end > 0:
        yield end
        end = name.rfind(".", 0, end)
    yield 0


def _router_recorders(owner: PreTrainedModel) -> list[OutputRecorder]:
    declared: Any = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = []
    for entry in declared if isinstance(declared, list) else [declared]:
        # A bare class means index 1, as transformers reads it.
        recorder = entry if isinstance(entry, OutputRecorder) else OutputRecorder(entry, index=1)
        if isinstance(recorder.target_class, type):
            recorders.append(recorder)
    return recorders


def _layer_number(name: str, place: int) -> int:
    """The first number in a module name such as `model.layers.3.mlp.gate`; its place among routers without one."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number else place
