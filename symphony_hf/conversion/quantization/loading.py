"""Quantizer for transformers' loader that packs the experts of each layer as soon as they have been read.

transformers takes one quantizer per load, so this one extends its 4-bit quantizer of bitsandbytes: it packs stacked
experts, and in the same load quantizes the linear layers if a BitsAndBytesConfig is given.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from symphony_hf.checkpoints.model_class import model_class_of, read_config
from symphony_hf.conversion.inspection.parts import Anatomy
from symphony_hf.errors import ConfigError, DataError, PatchError

from .packing import Packing, check_rows, stacked_experts

METHOD = "symphony_hf_experts_4bit"
"""Name under which the quantizer is registered, for quantization configs made for one load."""

_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
"""Arguments of `from_pretrained` that say where its files are."""


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of 4-bit linear layers, extended to stacked experts.

    Its config is that of the linear layers with the settings of this quantizer, from `_config_of_load`.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        settings = quantization_config.__dict__
        self.packing: Packing = settings.pop("experts")
        self.quantizes_linears: bool = settings.pop("quantizes_linears")
        quantization_config.quant_method = BitsAndBytesConfig(load_in_4bit=True).quant_method
        super().__init__(quantization_config, **kwargs)
        self.expert_names: frozenset[str] = frozenset()
        self.model: PreTrainedModel | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        experts = stacked_experts(model)
        if "cpu" in map(str, (device_map or {}).values()):
            check_rows(experts)
        self.expert_names = frozenset(experts)
        if self.quantizes_linears:
            config = self.quantization_config
            kept = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
            # Graphs need the router's unpacked weight, and 4-bit routers select poorly.
            config.llm_int8_skip_modules = [*kept, *Anatomy(model).routers]
            super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if param_name in self.expert_names:
            return True
        return self.quantizes_linears and super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        missing = [name for name in self.expert_names if not is_packed(model, name)]
        if missing:
            raise DataError(
                f"quantize_experts: the checkpoint lacks {len(missing)} of {len(self.expert_names)} experts' weights "
                f"({min(missing)}, ...)"
            )
        if self.quantizes_linears:
            # All that the base class does; older versions also call `is_serializable`.
            model.is_loaded_in_4bit = True  # type: ignore[assignment]
        return model

    def is_serializable(self) -> bool:
        """Refuse to save packed experts; adapters of transformers' own integration can be saved."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            return True
        raise PatchError(
            "save_pretrained: the model's experts are packed in 4 bits, and no loader reads such a checkpoint: save "
            "the adapter; to merge it, load it onto the base in 16 bits: load_adapter(base, folder).merge_and_unload()"
        )

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> None:
        raise PatchError("dequantize: the model's experts are packed in 4 bits: load the checkpoint in 16 bits instead")


class _Pack(ConversionOps):
    """Conversion that transformers' loader calls with each weight to quantize once it has been read."""

    def __init__(self, quantizer: ExpertsQuantizer, of_linears: ConversionOps) -> None:
        self.quantizer = quantizer
        self.of_linears = of_linears

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        left: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if name not in self.quantizer.expert_names:
                converted = self.of_linears.convert({name: weight}, model=model, missing_keys=missing_keys, **kwargs)
                left.update(converted)
                continue
            path, _, parameter_name = name.rpartition(".")
            module: nn.Module = model.get_submodule(path)
            expected = getattr(module, parameter_name).shape
            if weight.shape != expected:
                raise DataError(
                    f"`{name}` has the shape {tuple(weight.shape)} in the checkpoint, not {tuple(expected)}"
                )
            self.quantizer.packing.pack(module, parameter_name, weight)
            module._is_hf_initialized = True  # type: ignore[assignment]  # else the loader would initialize it
            if missing_keys is not None:
                missing_keys.discard(name)
        return left


def is_packed(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is behind a parametrization."""
    path, _, parameter_name = name.rpartition(".")
    return parameter_name in getattr(model.get_submodule(path), "parametrizations", {})


def load_packed(
    source: str | Path, packing: Packing, model_class: Any = None, loading: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load a checkpoint and pack its stacked experts.

    Args:
        source: Folder, or name on the Hub.
        packing: Form of the packing.
        model_class: Class that loads the checkpoint; by default that of its architecture.
        loading: Arguments of `from_pretrained`. A 4-bit `quantization_config` applies to the linear layers.

    Raises:
        ConfigError: If the checkpoint does not exist or is already quantized, or `quantization_config` is not 4-bit.
        UnsupportedModelError: If it has no stacked experts, or, on a CPU, experts with rows of unsupported size.
        DataError: If weights of experts are missing.
    """
    loading = dict(loading or {})
    config = read_config(source, **{name: value for name, value in loading.items() if name in _OF_THE_HUB})
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            raise ConfigError(
                f"quantize_experts: `{source}` is quantized already: give the checkpoint in 16 bits; or load it, and "
                "give the model"
            )
    loading["quantization_config"] = _config_of_load(packing, loading.pop("quantization_config", None))
    model = (model_class or model_class_of(config, source)).from_pretrained(source, **loading)
    quantizer = model.hf_quantizer
    if not quantizer.quantizes_linears:
        _forget_quantization(model)
    return guard_saving(model, quantizer)


def _config_of_load(packing: Packing, linears: Any) -> BitsAndBytesConfig:
    """Return a config for one load, with the settings that `ExpertsQuantizer` takes out of it."""
    if linears is not None and not getattr(linears, "load_in_4bit", False):
        raise ConfigError(
            "quantize_experts: `quantization_config` is that of the linear maps, and must be a BitsAndBytesConfig with "
            f"load_in_4bit=True, got {linears!r}"
        )
    config: Any = BitsAndBytesConfig(load_in_4bit=True) if linears is None else copy.deepcopy(linears)
    config.quant_method = METHOD
    config.experts = packing
    config.quantizes_linears = linears is not None
    return config


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make transformers, PEFT and Trainer see an unquantized model when only its experts are packed."""
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)


def guard_saving(model: PreTrainedModel, quantizer: ExpertsQuantizer | None = None) -> PreTrainedModel:
    """Make transformers call `ExpertsQuantizer.is_serializable` before it saves a model with packed experts.

    The quantizer is the one that packed them, or a new one for a model that was packed in place.
    """
    if quantizer is None:
        linears = getattr(model.config, "quantization_config", None)
        is_4bit = getattr(linears, "load_in_4bit", False)
        quantizer = ExpertsQuantizer(_config_of_load(Packing(), linears if is_4bit else None))
    quantizer.model = model
    model.hf_quantizer = quantizer
    return model
