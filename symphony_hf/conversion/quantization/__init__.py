"""Experts in 4 bits, packed by bitsandbytes during loading or in place, and the memory that they take."""

from .estimate import BytesPlan, PackedShape, plan_bytes, print_bytes_plan
from .quantize_experts import quantize_experts

__all__ = ["BytesPlan", "PackedShape", "plan_bytes", "print_bytes_plan", "quantize_experts"]
