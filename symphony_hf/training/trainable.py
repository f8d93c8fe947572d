"""What of a model is trained: all of it, the parameters that a recipe names, or adapters."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, nearest
from ..recipe import PeftSection


def choose_trained(model: PreTrainedModel, patterns: list[str] | None) -> None:
    """Freeze all parameters but those whose names match, and what of a vision tower nothing reads.

    Raises:
        ConfigError: If a pattern matches none.
    """
    for parameter in _unread_parameters(model):
        parameter.requires_grad_(False)
    if patterns is None:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = {re.sub(r"\b\d+\b", "*", name) for name in names}
            raise ConfigError(f"model: trainable: `{pattern}` matches no parameter; {nearest(pattern, known)}")
    for name, parameter in model.named_parameters():
        chosen = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(chosen and parameter.requires_grad)


def _unread_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Of LLaVA's vision tower, what comes after the layer whose features are taken: it never has a gradient, for which
    DistributedDataParallel would wait."""
    layer = getattr(model.config, "vision_feature_layer", None)
    tower = next((module for name, module in model.named_modules() if name.endswith("vision_tower")), None)
    if not isinstance(layer, int) or layer >= 0 or tower is None:
        return
    layers = next((module for module in tower.modules() if isinstance(module, nn.ModuleList)), None)
    assert layers is not None
    for module in layers[len(layers) + layer + 1 :]:
        yield from module.parameters()
    for name, parameter in tower.named_parameters():
        if any(part in name for part in ("post_layernorm", "head.")):  # CLIP's norm, SigLIP's pooling
            yield parameter


def add_adapters(model: PreTrainedModel, section: PeftSection | None) -> Any:
    """The model with LoRA adapters, or as it is without a section."""
    if section is None:
        return model
    from peft import get_peft_model

    from ..adapters import lora_config

    alpha = 2 * section.r if section.alpha is None else section.alpha
    config = lora_config(
        model,
        router=section.router,
        experts=section.experts,
        attention=section.attention,
        r=section.r,
        alpha=alpha,
        dropout=section.dropout,
    )
    return get_peft_model(model, config)
