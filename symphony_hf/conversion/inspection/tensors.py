"""Parameters and graphs of a model, by the names and shapes of the bare model without wrappers and packing."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.probe import full_shape


class HeldTensor(NamedTuple):
    """Parameter, or adjacency of a graph, as a model holds it.

    Attributes:
        name: Name in the model, with what PEFT and torch's parametrizations add to it.
        tensor: Tensor, which may be packed by a quantization, or empty when partitioned by ZeRO-3.
        shape: Shape of the whole unpacked weight.
        quant_state: State of bitsandbytes' 4-bit packing, if the tensor is packed.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    quant_state: Any = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def held_tensors(model: nn.Module) -> Iterator[HeldTensor]:
    """Yield each parameter once, and each graph, also those that are buffers."""
    packed = dict(_parametrized(model))
    for name, parameter in model.named_parameters():
        state = packed.get(name, getattr(parameter, "quant_state", None))
        yield HeldTensor(name, parameter, full_shape(parameter) if state is None else tuple(state.shape), state)
    for name, module in model.named_modules():
        if isinstance(module, ExpertGraph) and not isinstance(module.adjacency, nn.Parameter):
            yield HeldTensor(f"{name}.adjacency", module.adjacency, tuple(module.adjacency.shape))


def _parametrized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, quantization state) of the parameters that bitsandbytes packed behind a parametrization."""
    for name, module in model.named_modules():
        for parameter_name, parametrizations in getattr(module, "parametrizations", {}).items():
            for parametrization in parametrizations:
                if hasattr(parametrization, "quant_state"):
                    path = f"parametrizations.{parameter_name}.original"
                    yield f"{name}.{path}" if name else path, parametrization.quant_state


def base_of(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def bare_name(name: str) -> str:
    """Return the name of a module or parameter without what PEFT and parametrizations add to it.

    LoRA's own parameters start with the name of the adapted module: `q_proj.lora_A.default.weight`.
    """
    parts = name.removeprefix("base_model.model.").split(".") if name != "base_model.model" else []
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
