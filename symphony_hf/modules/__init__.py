"""Modules of our own: mixtures of experts in the place of dense MLPs."""

from .llava import build_llava, llava_config, vision_config_of
from .replacing import UpcycledSettings, check_loaded, restore_modules, upcycle_modules
from .upcycled import UpcycledMoE

__all__ = [
    "UpcycledMoE",
    "UpcycledSettings",
    "build_llava",
    "check_loaded",
    "llava_config",
    "restore_modules",
    "upcycle_modules",
    "vision_config_of",
]
