"""Packing of stacked expert weights in 4 bits, behind bitsandbytes' own parametrization."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from symphony_hf.conversion.inspection.parts import Anatomy, Part
from symphony_hf.conversion.inspection.tensors import HeldTensor, held_tensors
from symphony_hf.errors import ConfigError, PatchError, UnsupportedModelError, nearest

OLDEST_BITSANDBYTES = "0.49"
BLOCK = 64
"""Number of values that share a scale."""

QuantType = Literal["nf4", "fp4"]


@dataclass(frozen=True)
class Packing:
    """Form in which weights are packed.

    Attributes:
        quant_type: `nf4`, whose 16 values follow a normal distribution, or `fp4`.
        double_quant: Whether to quantize the scales too, of which there is one per 64 values.
    """

    quant_type: QuantType = "nf4"
    double_quant: bool = True

    def __post_init__(self) -> None:
        known = ("nf4", "fp4")
        if self.quant_type not in known:
            raise ConfigError(
                f"quantize_experts: `quant_type` is {self.quant_type!r}; {nearest(self.quant_type, known)}"
            )

    def pack(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Replace a parameter of a module by a weight packed on its own device; reading the parameter unpacks it."""
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

        # One expert at a time: on a CPU, bitsandbytes needs ten times the bytes of a weight to pack it.
        experts = weight.unbind() if weight.dim() == 3 and weight[0].numel() % BLOCK == 0 else (weight,)
        packed = [quantize_4bit(expert, blocksize=BLOCK, quant_type=self.quant_type) for expert in experts]
        state = packed[0][1]
        state.shape = weight.shape
        state.absmax = torch.cat([part.absmax for _, part in packed])
        if self.double_quant:  # as bitsandbytes does for a weight as a whole
            state.offset = state.absmax.mean()
            state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
            state.nested = True
        module._parameters[name] = nn.Parameter(torch.cat([part for part, _ in packed]), requires_grad=False)
        replace_parameter_4bit_prequantized(module, name, state.as_dict(), weight.device)
        module.parametrizations[name][0].__class__ = _unpacking_class()  # type: ignore[index, union-attr]


@functools.cache
def _unpacking_class() -> type[nn.Module]:
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    class Unpacking(Bnb4bitParametrization):  # type: ignore[misc]
        """bitsandbytes' parametrization, whose scales follow the weight to another device. They keep their types."""

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Unpacking":
            super()._apply(fn, recurse)
            of_no_type = torch.empty(0, dtype=torch.uint8, device=self.quant_state.code.device)
            self.quant_state.to(fn(of_no_type).device)
            return self

    return Unpacking


def check_bitsandbytes() -> None:
    """Check that a bitsandbytes is installed that can pack any parameter.

    Raises:
        ConfigError: If it is missing or too old.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("quantize_experts needs bitsandbytes: pip install 'symphony-hf[bitsandbytes]'")
    installed = importlib.metadata.version("bitsandbytes")
    if Version(installed) < Version(OLDEST_BITSANDBYTES):
        raise ConfigError(f"quantize_experts needs bitsandbytes >={OLDEST_BITSANDBYTES}, and {installed} is installed")


def check_rows(experts: Mapping[str, HeldTensor]) -> None:
    """Refuse weights that bitsandbytes unpacks wrongly on a CPU: those with a block of 64 values in two rows.

    Raises:
        UnsupportedModelError: If there is such a weight.
    """
    for name, held in experts.items():
        if held.shape[-1] % BLOCK:
            raise UnsupportedModelError(
                f"quantize_experts: `{name}` has rows of {held.shape[-1]} values, not a multiple of {BLOCK}, which "
                "bitsandbytes unpacks wrongly on a CPU: use an accelerator"
            )


def stacked_experts(model: nn.Module) -> dict[str, HeldTensor]:
    """Return the weights that hold all experts of a layer, which bitsandbytes alone does not quantize.

    Raises:
        UnsupportedModelError: If there are none.
        PatchError: If they are already packed.
    """
    anatomy = Anatomy(model)
    experts = [held for held in held_tensors(model) if anatomy.part_of(held) is Part.EXPERTS]
    stacked = {held.name: held for held in experts if len(held.shape) == 3}
    if any(held.quant_state is not None for held in stacked.values()):
        raise PatchError("quantize_experts: the model's experts are packed in 4 bits already")
    if not stacked:
        raise UnsupportedModelError(f"quantize_experts: {type(model).__name__}: {_why_none(experts, anatomy)}")
    return stacked


def _why_none(experts: list[HeldTensor], anatomy: Anatomy) -> str:
    if not experts:
        return "no experts were found in it"
    owners: list[Any] = [anatomy.modules[held.name.rpartition(".")[0]] for held in experts]
    if any(isinstance(owner, nn.Linear) for owner in owners):
        return (
            "each of its experts has linear maps of its own, which transformers quantizes itself: load it with "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True)"
        )
    shapes = sorted({held.shape for held in experts})
    return f"its experts are not stacked in parameters of shape (experts, ..., ...), but have the shapes {shapes}"
