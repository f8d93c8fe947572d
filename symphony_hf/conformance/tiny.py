"""A tiny model of every Mixture-of-Experts family that the installed transformers has.

The families are found, not listed, so that one that a new release adds is there at once: in `moe_families`, and, if
the rule of `shrinking.py` fits it, as a model that runs in milliseconds.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from .batches import tiny_batch, tiny_images
from .overrides import BROKEN, NOT_BUILT, OVERRIDES
from .shrinking import shrink

__all__ = ["moe_families", "tiny_batch", "tiny_config", "tiny_images", "tiny_model", "why_not_built"]

# A model with images comes whole; its text part has a row of its own where transformers can load it on its own.
_AUTO_CLASSES: tuple[tuple[Any, Mapping[str, Any]], ...] = (
    (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForMultimodalLM, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    (AutoModelForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
)
_MIXTURE = re.compile(r"^class \w*(Router|Expert|MoE|MOE|Moe|TopK\w*Gat)\w*\(nn\.Module", re.MULTILINE)
_ROUTER = re.compile(r"\w*(Router|TopKGating|MoE\w*Gate)|router(_gate)?")
_SELECTION_BIAS = re.compile(r".*(correction_bias|expert_bias|balancing_biases)")
_LOGIT_STD, _BIAS_STD = 2.0, 0.1


@cache
def moe_families() -> list[str]:
    """The model types, sorted, whose modeling module has a router or experts in it.

    Read off the source, so that no module is imported. A part of a model that no Auto class loads on its own, such as
    a vision encoder, has no row.
    """
    models = Path(transformers.__file__).parent / "models"
    modules = {
        source.parent.name
        for source in models.glob("*/modeling_*.py")
        if _MIXTURE.search(source.read_text(encoding="utf-8"))
    }
    types = [name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) in modules]
    loadable = [name for name in types if auto_class_of(name)]
    lost = modules - {model_type_to_module_name(name) for name in loadable}
    return sorted(loadable + [name for name in types if model_type_to_module_name(name) in lost])


def why_not_built(model_type: str) -> str | None:
    """Why a family has no tiny model under the installed transformers; None where it has one."""
    releases, fault = BROKEN.get(model_type, ("<0", ""))
    if SpecifierSet(releases, prereleases=True).contains(transformers.__version__):
        return f"broken in transformers {releases}: {fault}"
    return NOT_BUILT.get(model_type)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The family's own config, shrunk.

    Raises:
        ValueError: If the family cannot be built tiny, with the reason.
    """
    if reason := why_not_built(model_type):
        raise ValueError(f"{model_type}: not built: {reason}")
    return shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family, in eval mode, with seeded random weights and routers that tell the experts apart.

    Raises:
        ValueError: If the family cannot be built tiny, with the reason.
    """
    config = tiny_config(model_type)
    auto_class = auto_class_of(model_type)
    if auto_class is None:
        raise ValueError(f"{model_type}: no Auto class of transformers {transformers.__version__} loads it")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto_class.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            _spread_routers(model)
    return _keep_float32(model)


def auto_class_of(model_type: str) -> Any:
    """The Auto class that loads a family whole; None where there is none."""
    return next((auto_class for auto_class, names in _AUTO_CLASSES if model_type in names), None)


def _keep_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Widen what `from_pretrained` would have kept wide; `from_config` does not look."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and any(re.search(rf"(^|\.){part}($|\.)", name) for part in wide):
            tensor.data = tensor.data.float()
    return model


def _spread_routers(model: PreTrainedModel) -> None:
    """Draw the routers anew, so that hardly two experts have near logits, and the biases that only select matter.

    Families leave their biases at zero, and some their routers, for the checkpoint to fill.
    """
    for name, module in model.named_modules():
        if _ROUTER.fullmatch(type(module).__name__) or _ROUTER.fullmatch(name.rpartition(".")[2]):
            # Gemma 4 and Muse Spark scale what goes into the product, or what comes out of it.
            scale = getattr(module, "scalar_root_size", 1.0) * getattr(module, "output_multiplier", 1.0)
            for parameter in module.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=_LOGIT_STD / scale * parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=_BIAS_STD)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _SELECTION_BIAS.fullmatch(name):
            tensor.normal_(std=_BIAS_STD)
            if name.endswith("balancing_biases"):
                tensor[-1] = -1.0  # of the expert that does nothing; ZAYA sets it on every load
        elif name.endswith("tid2eid"):
            # DeepSeek-V4's first routers look their experts up by the token.
            num_experts = model.config.get_text_config().n_routed_experts
            tensor.copy_(torch.rand(len(tensor), num_experts).topk(tensor.shape[1]).indices)
