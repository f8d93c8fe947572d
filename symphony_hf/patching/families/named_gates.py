"""Routers that the user names: gates of remote-code and home-made models, most often a plain `nn.Linear` in a block."""

import re
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import UnsupportedModelError, nearest

from .discovery import FoundRouter, find_routers, look_at_routers, of_layers, owner_of


def routers_of(model: nn.Module, settings: SymphonyConfig, inside: bool = False) -> list[FoundRouter]:
    """Return the routers that the settings select: named ones or all, in the wanted layers.

    Args:
        model: Any model.
        settings: Its own, or of the model that it is inside of.
        inside: Whether it may be inside of that one, in which names have more in front.

    Raises:
        UnsupportedModelError: If there is none, one cannot be patched, or a wanted layer has none.
    """
    if settings.routers is None:
        found = find_routers(model)
    else:
        patterns = _seen_from_inside(model, settings.routers) if inside else settings.routers
        found = find_gates(model, patterns, settings.top_k)
    return of_layers(found, settings.layers, model)


def _seen_from_inside(model: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns without the prefix of a nested model's name if they match nothing as they are."""
    names = [name for name, _ in model.named_modules()]

    def shorten(pattern: str) -> str:
        tail = pattern
        while tail and not any(fnmatchcase(name, tail) for name in names):
            tail = tail.partition(".")[2]
        return tail or pattern

    return tuple(shorten(pattern) for pattern in patterns)


def find_gates(model: nn.Module, patterns: tuple[str, ...], top_k: int | None) -> list[FoundRouter]:
    """Return the modules whose names match shell-style patterns, such as `*.mlp.gate`.

    Without `top_k`, the number of experts per token is read from each gate's block.

    Raises:
        UnsupportedModelError: If a pattern matches nothing, or a module that cannot be patched.
    """
    modules = dict(model.named_modules())
    owners = {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}
    names = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            linears = {re.sub(r"\b\d+\b", "*", name) for name, m in modules.items() if isinstance(m, nn.Linear)}
            raise UnsupportedModelError(
                f"{type(model).__name__}: `routers` pattern {pattern!r} matches no module; {nearest(pattern, linears)}"
            )
    return look_at_routers(model, modules, [(name, owner_of(name, owners) or model) for name in names], top_k)
