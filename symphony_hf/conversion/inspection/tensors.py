"""A model's parameters and graphs, by the names and in the shapes of the bare model, below what wraps or packs them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.probe import full_shape


class HeldTensor(NamedTuple):
    """A parameter, or the adjacency of a graph, as a model holds it.

    Attributes:
        name: As the model has it, with what PEFT and torch's parametrizations put into it.
        tensor: Itself: packed, where it is quantized, and empty, where ZeRO-3 has partitioned it.
        shape: What it stands for.
        quant_state: How bitsandbytes packed it in 4 bits; None where it did not.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    quant_state: Any = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def held_tensors(model: nn.Module) -> Iterator[HeldTensor]:
    """Yield each parameter once, and each graph, be it a parameter or a buffer."""
    packed = dict(_parametrized(model))
    for name, parameter in model.named_parameters():
        state = packed.get(name, getattr(parameter, "quant_state", None))
        yield HeldTensor(name, parameter, full_shape(parameter) if state is None else tuple(state.shape), state)
    for name, module in model.named_modules():
        if isinstance(module, ExpertGraph) and not isinstance(module.adjacency, nn.Parameter):
            yield HeldTensor(f"{name}.adjacency", module.adjacency, tuple(module.adjacency.shape))


def _parametrized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, bitsandbytes' state) of the parameters that it packed behind a parametrization."""
    for name, module in model.named_modules():
        for parameter_name, parametrizations in getattr(module, "parametrizations", {}).items():
            for parametrization in parametrizations:
                if hasattr(parametrization, "quant_state"):
                    path = f"parametrizations.{parameter_name}.original"
                    yield f"{name}.{path}" if name else path, parametrization.quant_state


def bare_name(name: str) -> str:
    """A module's or parameter's name without what PEFT and parametrizations put into it.

    LoRA's own parameters have the name of what they adapt in front: `q_proj.lora_A.default.weight`.
    """
    parts = name.removeprefix("base_model.model.").split(".")
    bare: list[str] = []
    is_parametrized = False
    while parts:
        part = parts.pop(0)
        if part == "modules_to_save":
            parts[:1] = []  # the adapter's name
        elif part == "parametrizations":
            is_parametrized = True
        elif part not in ("base_layer", "original_module") and not (is_parametrized and part == "original"):
            bare.append(part)
    return ".".join(bare)
