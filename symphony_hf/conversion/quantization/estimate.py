"""Memory of a model in 4 bits: one weight of each shape is packed and measured, the rest is counted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from tqdm import tqdm

from symphony_hf.checkpoints.graph_files import SUFFIX as GRAPH
from symphony_hf.compat import versions
from symphony_hf.conversion.inspection.counts import held_types
from symphony_hf.conversion.inspection.inspect import readable_bytes
from symphony_hf.conversion.inspection.parts import Anatomy
from symphony_hf.conversion.inspection.tensors import held_tensors
from symphony_hf.tables import Table, TableCell

from .packing import Packing, check_bitsandbytes, stacked_experts


@dataclass(frozen=True)
class PackedShape:
    """Weights of one shape: `experts` or `linear maps`, their number, and one's measured bytes, packed and not."""

    kind: str
    shape: tuple[int, ...]
    count: int
    plain_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class BytesPlan:
    """Memory of a model with and without packing; `dtype` is that of the weights that are not packed."""

    model: str
    parameters: int
    dtype: str
    packing: Packing
    plain_bytes: int
    shapes: tuple[PackedShape, ...]

    def packed_bytes(self, *kinds: str) -> int:
        """Return the bytes of the model with all weights of these kinds packed."""
        return self.plain_bytes - sum(
            shape.count * (shape.plain_bytes - shape.packed_bytes) for shape in self.shapes if shape.kind in kinds
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values for a JSON file."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "quant_type": self.packing.quant_type,
            "double_quant": self.packing.double_quant,
            "bytes": {
                self.dtype: self.plain_bytes,
                "experts in 4 bits": self.packed_bytes("experts"),
                "experts and linear maps in 4 bits": self.packed_bytes("experts", "linear maps"),
            },
            "measured": [
                {
                    "kind": shape.kind,
                    "shape": list(shape.shape),
                    "count": shape.count,
                    f"{self.dtype} bytes": shape.plain_bytes,
                    "4-bit bytes": shape.packed_bytes,
                }
                for shape in self.shapes
            ],
            "versions": versions("bitsandbytes"),
        }


def plan_bytes(model: nn.Module, packing: Packing | None = None, dtype: torch.dtype = torch.bfloat16) -> BytesPlan:
    """Pack one random weight of each shape in a model, also on the meta device, and count the others.

    Raises:
        ConfigError: If bitsandbytes is missing.
        UnsupportedModelError: If there are no stacked experts.
        PatchError: If the experts are already packed.
    """
    check_bitsandbytes()
    packing = packing or Packing()
    experts = Counter(held.shape for held in stacked_experts(model).values())
    linears = Counter(tuple(weight.shape) for weight in _linear_weights(model))
    kinds = [("experts", shape, count) for shape, count in experts.items()]
    kinds += [("linear maps", shape, count) for shape, count in linears.items()]
    shapes = []
    with tqdm(kinds, desc="Measuring", unit=" shapes", disable=None) as bar:
        for kind, shape, count in bar:
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.empty(shape, dtype=dtype).normal_(std=0.02))
            plain = holder.weight.nbytes
            packing.pack(holder, "weight", holder.weight.detach())
            (packed,) = held_types(holder)
            shapes.append(PackedShape(kind, shape, count, plain, packed.bytes))
    held = list(held_tensors(model))
    return BytesPlan(
        model=type(model).__name__,
        parameters=sum(tensor.numel for tensor in held),
        dtype=str(dtype).removeprefix("torch."),
        packing=packing,
        # Graphs are float32 in any model.
        plain_bytes=sum(t.numel * (4 if t.name.endswith(GRAPH) else dtype.itemsize) for t in held),
        shapes=tuple(shapes),
    )


def _linear_weights(model: Any) -> list[torch.Tensor]:
    """Return the weights that `quantize_experts` quantizes on request: all but those of routers and LM head."""
    routers = Anatomy(model).routers
    head = model.get_output_embeddings()
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not any(f"{name}.".startswith(f"{router}.") for router in routers)
        and module.weight.numel()
    ]


def print_bytes_plan(plan: BytesPlan, console: Console | None = None) -> None:
    """Print a plan's totals."""
    rows = [
        [form, TableCell(readable_bytes(size), size), TableCell(f"{size / plan.plain_bytes:.1%}", size)]
        for form, size in plan.to_dict()["bytes"].items()
    ]
    Table(f"{plan.model} in memory, {plan.packing.quant_type}", ("form", "bytes", "share"), rows).print(console)
