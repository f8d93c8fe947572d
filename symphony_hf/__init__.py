"""symphony_hf: Symphony routing (arXiv 2510.16411) for the MoE models of Hugging Face Transformers.

    from symphony_hf import symphonize
    symphonize(model)      # the same model, routed through the graph of its experts

Importing this package lets transformers' own classes load Symphony checkpoints.
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
    "SymphonyCallback": "training",
    "SymphonyConfig": "config",
    "SymphonyError": "errors",
    "SymphonyWarning": "errors",
    "UnsupportedModelError": "errors",
    "add_router_losses": "attachment",
    "expert_graphs": "patching",
    "export_folded": "hub",
    "fold": "folding",
    "is_symphonized": "patching",
    "symphonize": "patching",
    "unsymphonize": "patching",
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
    "SymphonyCallback",
    "SymphonyConfig",
    "SymphonyError",
    "SymphonyWarning",
    "UnsupportedModelError",
    "__version__",
    "add_router_losses",
    "expert_graphs",
    "export_folded",
    "fold",
    "is_symphonized",
    "symphonize",
    "unsymphonize",
    "update_graphs",
]

if TYPE_CHECKING:
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
        SymphonyError,
        SymphonyWarning,
        UnsupportedModelError,
    )
    from .folding import fold
    from .hub import export_folded
    from .patching import expert_graphs, is_symphonized, symphonize, unsymphonize
    from .training import SymphonyCallback


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_loading_wraps()
