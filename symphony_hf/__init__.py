"""symphony_hf: Symphony routing (arXiv 2510.16411) for the MoE models of Hugging Face Transformers.

    from symphony_hf import symphonize
    symphonize(model)      # the same model, routed through the graph of its experts

Importing this package lets transformers' own classes load Symphony checkpoints, and the model of `models.wikitext`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from symphony_hf.patching.from_pretrained import install_loading_wraps
from symphony_hf_autoload import when_defined

from .compat import __version__

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
    "RoutingChoices": "patching.replay.choices",
    "RoutingMonitor": "training.routing_monitor",
    "SymphonyCallback": "training.callback",
    "SymphonyConfig": "config",
    "SymphonyError": "errors",
    "SymphonyWarning": "errors",
    "UnsupportedModelError": "errors",
    "UpcycleError": "errors",
    "UpcycledMoE": "models.upcycled_moe",
    "add_router_losses": "patching.attachment",
    "expert_graphs": "patching.symphonize",
    "export_folded": "patching.folding",
    "fold": "patching.folding",
    "inspect_model": "conversion.inspection.inspect",
    "is_symphonized": "patching.symphonize",
    "load_adapter": "conversion.adapters.loading",
    "load_checkpoint": "checkpoints.untrusted",
    "lora_config": "conversion.adapters.lora",
    "print_inspection": "conversion.inspection.inspect",
    "print_trainable_parameters": "conversion.adapters.trainable",
    "push": "conversion.push",
    "quantize_experts": "conversion.quantization.quantize_experts",
    "record_routing": "patching.replay.contexts",
    "replay_routing": "patching.replay.contexts",
    "symphonize": "patching.symphonize",
    "trainable_parameters": "conversion.adapters.trainable",
    "unsymphonize": "patching.symphonize",
    "upcycle": "conversion.upcycling.upcycle",
    "upcycle_modules": "patching.upcycle_modules",
    "update_graphs": "patching.attachment",
    "with_router_losses": "training.router_losses",
    "with_router_replay": "training.router_replay",
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
    "RoutingChoices",
    "RoutingMonitor",
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
    "record_routing",
    "replay_routing",
    "symphonize",
    "trainable_parameters",
    "unsymphonize",
    "upcycle",
    "upcycle_modules",
    "update_graphs",
    "with_router_losses",
    "with_router_replay",
]

if TYPE_CHECKING:
    from symphony_hf.checkpoints.untrusted import load_checkpoint
    from symphony_hf.conversion.adapters.loading import load_adapter
    from symphony_hf.conversion.adapters.lora import lora_config
    from symphony_hf.conversion.adapters.trainable import print_trainable_parameters, trainable_parameters
    from symphony_hf.conversion.inspection.inspect import inspect_model, print_inspection
    from symphony_hf.conversion.push import push
    from symphony_hf.conversion.quantization.quantize_experts import quantize_experts
    from symphony_hf.conversion.upcycling.upcycle import upcycle
    from symphony_hf.models.upcycled_moe import UpcycledMoE
    from symphony_hf.patching.attachment import add_router_losses, update_graphs
    from symphony_hf.patching.folding import export_folded, fold
    from symphony_hf.patching.replay.choices import RoutingChoices
    from symphony_hf.patching.replay.contexts import record_routing, replay_routing
    from symphony_hf.patching.symphonize import expert_graphs, is_symphonized, symphonize, unsymphonize
    from symphony_hf.patching.upcycle_modules import upcycle_modules
    from symphony_hf.training.callback import SymphonyCallback
    from symphony_hf.training.router_losses import with_router_losses
    from symphony_hf.training.router_replay import with_router_replay
    from symphony_hf.training.routing_monitor import RoutingMonitor

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _install_adapter_wraps(tuners: Any) -> None:
    importlib.import_module(".conversion.adapters.peft_wraps", __name__).install_adapter_wraps(tuners)


def _install_prompt_wrap(peft_models: Any) -> None:
    importlib.import_module(".conversion.adapters.peft_wraps", __name__).install_prompt_wrap(peft_models)


install_loading_wraps()
when_defined("peft.tuners.tuners_utils", "BaseTuner", _install_adapter_wraps)
when_defined("peft.peft_model", "PeftModel", _install_prompt_wrap)
importlib.import_module(".models.wikitext", __name__)  # transformers' Auto classes learn of its config
