"""The paper's WikiText-103 systems as a transformers model."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from .configuration import WikiTextMoeConfig

if TYPE_CHECKING:
    from .modeling import WikiTextMoeForCausalLM, WikiTextMoeModel

__all__ = ["WikiTextMoeConfig", "WikiTextMoeForCausalLM", "WikiTextMoeModel"]

AutoConfig.register(WikiTextMoeConfig.model_type, WikiTextMoeConfig)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import modeling

    return getattr(modeling, name)
