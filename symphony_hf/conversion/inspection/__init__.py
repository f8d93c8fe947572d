"""Inspection of a model: parameters by part, active parameters per token, data types and routers."""

from symphony_hf.checkpoints.model_class import empty_model, model_class_of, named_class_of, read_config

from .counts import PartCount, TypeCount, count_parts, held_types, state_bytes, stored_types
from .inspect import Inspection, inspect_model, print_inspection, readable_bytes
from .parts import Anatomy, Part, Routing
from .tensors import HeldTensor, bare_name, held_tensors

__all__ = [
    "Anatomy",
    "HeldTensor",
    "Inspection",
    "Part",
    "PartCount",
    "Routing",
    "TypeCount",
    "bare_name",
    "count_parts",
    "empty_model",
    "held_tensors",
    "held_types",
    "inspect_model",
    "model_class_of",
    "named_class_of",
    "print_inspection",
    "read_config",
    "readable_bytes",
    "state_bytes",
    "stored_types",
]
