"""PEFT adapters with graphs: LoRA configs, the record beside an adapter, and loading."""

from .loading import load_adapter, restore_adapter
from .lora import lora_config
from .record import AdapterRecord, record_adapters
from .trainable import TrainableCount, print_trainable_parameters, trainable_parameters

__all__ = [
    "AdapterRecord",
    "TrainableCount",
    "load_adapter",
    "lora_config",
    "print_trainable_parameters",
    "record_adapters",
    "restore_adapter",
    "trainable_parameters",
]
