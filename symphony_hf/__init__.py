"""symphony_hf: Symphony routing (arXiv 2510.16411) for the MoE models of Hugging Face Transformers.

    from symphony_hf import symphonize
    symphonize(model)      # the same model, routed through the graph of its experts

Importing this package lets transformers' own classes load Symphony checkpoints, and the model of `modules.wikitext`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .hub import install_loading_wraps

_HOMES = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "EvaluationError": "errors",
    "FoldError": "errors",
    "GraphError": "errors",
    "PatchError": "errors",
    "PushError": "errors",
    "ReportError": "errors",
    "SymphonyCallback": "training",
    "SymphonyConfig": "config",
    "SymphonyError": "errors",
    "SymphonyWarning": "errors",
    "UnsupportedModelError": "errors",
    "UpcycleError": "errors",
    "UpcycledMoE": "modules",
    "add_router_losses": "attachment",
    "expert_graphs": "patching",
    "export_folded": "hub",
    "fold": "folding",
    "inspect_model": "anatomy",
    "is_symphonized": "patching",
    "load_adapter": "adapters",
    "load_checkpoint": "loading",
    "lora_config": "adapters",
    "print_inspection": "anatomy",
    "print_trainable_parameters": "adapters",
    "push": "sharing",
    "quantize_experts": "quantization",
    "symphonize": "patching",
    "trainable_parameters": "adapters",
    "unsymphonize": "patching",
    "upcycle": "upcycling",
    "upcycle_modules": "modules",
    "update_graphs": "attachment",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvaluationError",
    "FoldError",
    "GraphError",
    "PatchError",
    "PushError",
    "ReportError",
    "SymphonyCallback",
    "SymphonyConfig",
    "SymphonyError",
    "SymphonyWarning",
    "UnsupportedModelError",
    "UpcycleError",
    "UpcycledMoE",
    "__version__",
    "add_router_losses",
    "expert_graphs",
    "export_folded",
    "fold",
    "inspect_model",
    "is_symphonized",
    "load_adapter",
    "load_checkpoint",
    "lora_config",
    "print_inspection",
    "print_trainable_parameters",
    "push",
    "quantize_experts",
    "symphonize",
    "trainable_parameters",
    "unsymphonize",
    "upcycle",
    "upcycle_modules",
    "update_graphs",
]

if TYPE_CHECKING:
    from .adapters import load_adapter, lora_config, print_trainable_parameters, trainable_parameters
    from .anatomy import inspect_model, print_inspection
    from .attachment import add_router_losses, update_graphs
    from .config import SymphonyConfig
    from .errors import (
        CheckpointError,
        ConfigError,
        DataError,
        EvaluationError,
        FoldError,
        GraphError,
        PatchError,
        PushError,
        ReportError,
        SymphonyError,
        SymphonyWarning,
        UnsupportedModelError,
        UpcycleError,
    )
    from .folding import fold
    from .hub import export_folded
    from .loading import load_checkpoint
    from .modules import UpcycledMoE, upcycle_modules
    from .patching import expert_graphs, is_symphonized, symphonize, unsymphonize
    from .quantization import quantize_experts
    from .sharing import push
    from .training import SymphonyCallback
    from .upcycling import upcycle


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_loading_wraps()
importlib.import_module(".modules.wikitext", __name__)  # transformers' Auto classes learn of its config
