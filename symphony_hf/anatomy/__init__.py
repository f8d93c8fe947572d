"""What a model is made of: parameters by part, active ones per token, the types they are held in, its routers."""

from .counts import PartCount, count_parts
from .inspection import Inspection, inspect_model
from .parts import Anatomy, Part, Routing
from .sources import empty_model, model_class_of, named_class_of, read_config
from .storage import TypeCount, held_types, state_bytes, stored_types
from .tables import print_inspection, readable_bytes
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
