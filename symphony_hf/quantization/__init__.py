"""Experts in 4 bits, packed by bitsandbytes while they are loaded, or in place; and how many bytes that takes."""

from .experts import quantize_experts
from .planning import BytesPlan, PackedShape, plan_bytes, print_bytes_plan

__all__ = ["BytesPlan", "PackedShape", "plan_bytes", "print_bytes_plan", "quantize_experts"]
