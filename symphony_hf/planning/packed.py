"""4-bit weights on the meta device: what they take, and experts that are unpacked where they are used."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..anatomy import Anatomy, Part, held_tensors

_BLOCK, _NESTED_BLOCK = 64, 256
_TABLES = 16 * 4 + 256 * 4 + 4
"""Bytes of the two code books and of the scales' mean."""


def packed_bytes(numel: int) -> int:
    """Bytes of a weight in NF4 with its scales in 8 bits: one scale for 64 numbers, one of the scales for 256 of those.

    Source: QLoRA, arXiv 2305.14314, double quantization. Deviation: none.
    """
    scales = -(-numel // _BLOCK)
    return -(-numel // 2) + scales + 4 * -(-scales // _NESTED_BLOCK) + _TABLES


def packed_names(model: Any) -> set[str]:
    """The names of the weights that a recipe with `quantization` packs: experts and linear maps, but for those of
    routers, and the head."""
    anatomy = Anatomy(model)
    head = model.get_output_embeddings()
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    held = {tensor.name: anatomy.part_of(tensor) for tensor in held_tensors(model) if len(tensor.shape) in (2, 3)}
    stacked = {tensor.name for tensor in held_tensors(model) if len(tensor.shape) == 3}
    return {
        name
        for name, part in held.items()
        if (part is Part.EXPERTS and name in stacked) or (part is not Part.ROUTERS and name in linears)
    }


class _Unpack(nn.Module):
    """A packed weight as what it stands for, anew at each use."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._shape, self._dtype = weight.shape, weight.dtype

    def forward(self, packed: Tensor) -> Tensor:
        return packed.new_empty(self._shape, dtype=self._dtype)


def pack_experts(model: nn.Module) -> None:
    """Have each use of stacked experts make them in 16 bits: autograd keeps those, which no other weight's does."""
    for held in [held for held in held_tensors(model) if len(held.shape) == 3]:
        path, _, name = held.name.rpartition(".")
        module, weight = model.get_submodule(path), held.tensor
        packed = torch.empty(packed_bytes(held.numel), dtype=torch.uint8, device="meta")
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
        parametrize.register_parametrization(module, name, _Unpack(weight), unsafe=True)
