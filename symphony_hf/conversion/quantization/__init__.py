"""Experts in 4 bits, packed by bitsandbytes while they are loaded, or in place; and how many bytes that takes."""

from .estimate import BytesPlan, PackedShape, plan_bytes, print_bytes_plan
from .quantize_experts import quantize_experts

__all__ = ["BytesPlan", "PackedShape", "plan_bytes", "print_bytes_plan", "quantize_experts"]
