"""Plugins of vLLM and SGLang, which they find by the entry points in pyproject.toml.

Both engines get a subclass of their own model class, which folds the graphs while the checkpoint is read. vLLM finds it
in its model registry, by the mark in the config's `architectures`. SGLang treats many families by their names, so its
configs have the family's own, and a hook on its choice of a model class returns the subclass for Symphony checkpoints.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from symphony_hf.checkpoints.marks import ARCHITECTURE_PREFIX, CHOOSES_BY_MARK
from symphony_hf.errors import PatchError

from .router_names import ROUTERS
from .weight_stream import WeightStream

_CHOICE = "get_model_architecture"
"""SGLang's function that returns the class and the architecture of a model config."""


def register_vllm() -> None:
    """Register a class for each family that vLLM has. Entry point of the group `vllm.general_plugins`."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in ROUTERS:
        if architecture in known:
            name = ARCHITECTURE_PREFIX + architecture
            ModelRegistry.register_model(name, f"{__name__}:{name}")  # imported when a checkpoint asks for it


def register_sglang() -> None:
    """Register the hook on the choice of a model class. Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.model_loader import utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    original = getattr(utils, _CHOICE)
    HookRegistry.register(f"{utils.__name__}.{_CHOICE}", _choose_class, HookType.AROUND)
    # SGLang logs a hook that it cannot apply, and goes on: it then sees the mark, and refuses the checkpoint.
    CHOOSES_BY_MARK["sglang"] = lambda: getattr(utils, _CHOICE) is original


def _choose_class(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    model_class, architecture = original(model_config, *args, **kwargs)
    if getattr(model_config.hf_config, "symphony", None) is None:
        return model_class, architecture
    return folding_class(model_class, model_class.__name__, architecture, _first_argument), architecture


def _first_argument(config: Any, *args: Any, **kwargs: Any) -> Any:
    return config


def _vllm_config(*args: Any, vllm_config: Any, **kwargs: Any) -> Any:
    return vllm_config.model_config.hf_config


@functools.cache
def folding_class(base: Any, name: str, architecture: str, config_of: Callable[..., Any]) -> type:
    """Return the subclass of an engine's model class that loads Symphony checkpoints.

    Args:
        base: The engine's model class.
        name: Name of the subclass, which engines also look things up by.
        architecture: Name of the family's model class in Transformers.
        config_of: Function that takes the arguments of the class, and returns the config among them.
    """

    @functools.wraps(base.__init__)  # engines read its signature
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stream = WeightStream(config_of(*args, **kwargs), architecture)  # refuses before memory is allocated
        base.__init__(self, *args, **kwargs)
        self._symphony_stream = stream

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        return base.load_weights(self, self._symphony_stream.fold(weights), *args, **kwargs)

    if not hasattr(base, "load_weights"):
        raise PatchError(f"{base.__name__} has no `load_weights`, which symphony_hf folds graphs in")
    namespace = {"__module__": __name__, "__init__": __init__, "load_weights": load_weights, "__doc__": base.__doc__}
    return type(name, (base,), namespace)


def __getattr__(name: str) -> Any:
    """Return the class that vLLM asks for by its registered name, such as `SymphonyMixtralForCausalLM`."""
    architecture = name.removeprefix(ARCHITECTURE_PREFIX)
    if architecture == name or architecture not in ROUTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry

    return folding_class(ModelRegistry.models[architecture].load_model_cls(), name, architecture, _vllm_config)
