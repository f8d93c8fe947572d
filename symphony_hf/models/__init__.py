"""Models and modules of this package: upcycled MoE layers, their routers, LLaVA, and the WikiText model."""

from typing import TYPE_CHECKING, Any

from .upcycled_moe import UpcycledMoE

if TYPE_CHECKING:
    from .llava import build_llava, llava_config, vision_config_of

__all__ = [
    "UpcycledMoE",
    "build_llava",
    "llava_config",
    "vision_config_of",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import llava  # transformers' LLaVA brings what takes a second to import

    return getattr(llava, name)
