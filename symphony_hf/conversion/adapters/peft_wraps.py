"""PEFT's own ways of loading and making adapters, which bring the graphs: `PeftModel.from_pretrained`, TRL's scripts.

Four methods of PEFT are wrapped, and act only on adapters with graphs and on Symphony models:

- `from_peft_type` makes the config of a saved adapter, without the mark in its file.
- `save_pretrained` of a config writes its record too.
- `inject_adapter` puts an adapter into a model. The model is symphonized first, if the adapter was saved with graphs; a
  new adapter of a Symphony model gets a copy of its graphs and a record of this model, on a copy of its config: one
  config may be used for several models.
- `PeftModel.add_adapter` puts prompts around a model, which cannot hold graphs.
"""

import functools
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.marks import MARK, unmark
from symphony_hf.config import SymphonyConfig
from symphony_hf.conversion.inspection.tensors import bare_name
from symphony_hf.errors import ConfigError, PatchError, SymphonyWarning
from symphony_hf.files import ADAPTER_CONFIG
from symphony_hf.patching.attachment import trackers_of
from symphony_hf.patching.symphonize import is_symphonized, symphonize, symphony_routers

from .loading import prepare_base
from .record import (
    NEEDS,
    AdapterRecord,
    check_not_repeated,
    copy_graphs,
    graphs_in_adapter,
    keep_record,
    kept_record,
    save_with_record,
    without_record,
)
from .targets import is_end_of, shortest_ends

_WHERE = f"{ADAPTER_CONFIG}: {MARK}.record"
"""Place of the record that PEFT reads."""


def install_adapter_wraps(tuners: Any) -> None:
    """Wrap the methods of PEFT, once.

    Args:
        tuners: `peft.tuners.tuners_utils.BaseTuner`.
    """
    from peft.config import PeftConfigMixin

    if not hasattr(tuners.inject_adapter, "_symphony_wrap"):
        tuners.inject_adapter = _wrap_inject_adapter(tuners.inject_adapter)
        PeftConfigMixin.from_peft_type = classmethod(_wrap_from_peft_type(PeftConfigMixin.from_peft_type.__func__))  # type: ignore[attr-defined]
        PeftConfigMixin.save_pretrained = _wrap_save_pretrained(PeftConfigMixin.save_pretrained)  # type: ignore[method-assign]


def install_prompt_wrap(peft_models: Any) -> None:
    """Wrap the method of PEFT that puts prompts around a model, once.

    Args:
        peft_models: `peft.peft_model.PeftModel`.
    """
    if not hasattr(peft_models.add_adapter, "_symphony_wrap"):
        peft_models.add_adapter = _wrap_add_adapter(peft_models.add_adapter)


def _wrap_from_peft_type(original: Any) -> Any:
    @functools.wraps(original)
    def from_peft_type(cls: Any, **values: Any) -> Any:
        if "symphony" not in values and MARK not in values:
            config = original(cls, **values)
            config.__dict__.setdefault(NEEDS, None)
            return config
        entry, values = values.get(MARK), unmark(values, ADAPTER_CONFIG)
        settings = values.pop("symphony", None)
        needs: Any = None if settings is None else SymphonyConfig.from_stored(settings, f"{ADAPTER_CONFIG}: symphony")
        config = original(cls, **values)
        if entry is not None and "record" in entry:
            needs = AdapterRecord.parse(entry["record"], _WHERE)
            keep_record(config, needs)
        config.__dict__[NEEDS] = needs
        return config

    return from_peft_type


def _wrap_save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        record = kept_record(self)
        if record is None:
            original(self, save_directory, **kwargs)
        else:
            save_with_record(functools.partial(original, self), record, save_directory, **kwargs)

    return save_pretrained


def _config_of_new(model: nn.Module, config: Any, others: list[str]) -> Any:
    """Return the config of a new adapter of this model, whatever other models it was used for."""
    if is_symphonized(model):
        check_not_repeated(getattr(config, "layer_replication", None), "the adapter's config")
        config = without_record(config)
        _name_graphs(model, config, others)
    elif kept_record(config) is not None:
        config = without_record(config)
        warnings.warn(
            f"the adapter's config is of a Symphony model, and this {type(model).__name__} has no graphs, so neither "
            "has its adapter: symphonize the model first if it should have",
            SymphonyWarning,
            stacklevel=4,
        )
    return config


def _name_graphs(model: nn.Module, config: Any, others: list[str]) -> None:
    """Put the graphs into a new adapter too: training changes them, and no other file would save them."""
    is_trained = hasattr(config, "modules_to_save") and not config.inference_mode
    if not (is_trained and isinstance(model, PreTrainedModel)):
        return
    _refuse_target_parameters(model, config)
    if any(graphs_in_adapter(model, other) == "train" for other in others):
        return  # PEFT cannot hold a router in one adapter and its graph alone in another
    named = list(config.modules_to_save or ())
    if any(isinstance(router, nn.Linear) and _is_target(config, name) for name, router in symphony_routers(model)):
        return  # refused by the first forward, with the reason
    routers = [bare_name(name) for name, _ in symphony_routers(model)]
    ends = tuple(named)
    left = [f"{name}.symphony" for name in routers if not (name.endswith(ends) or f"{name}.symphony".endswith(ends))]
    if left:
        names = [bare_name(name) for name, _ in model.named_modules()]
        config.modules_to_save = [*named, *shortest_ends(left, names, matches=str.endswith)]


def _refuse_target_parameters(model: nn.Module, config: Any) -> None:
    """Refuse LoRA on the weight of a router, whose graph PEFT then cannot put into the adapter."""
    entries = getattr(config, "target_parameters", None) or ()
    routers: list[tuple[str, Any]] = list(symphony_routers(model))
    for name, router in routers:
        for parameter, _ in router.named_parameters():
            for entry in entries:
                if is_end_of(bare_name(f"{name}.{parameter}"), entry):
                    raise ConfigError(
                        f"the adapter's config: `target_parameters`: {entry!r} matches `{parameter}` of the router "
                        f"`{bare_name(name)}`, and PEFT cannot keep a router's graph in an adapter with LoRA on it: "
                        "leave the entry out, and train the routers as a whole with `symphony_hf.lora_config(model, "
                        "router='train')`"
                    )


def _is_target(config: Any, name: str) -> bool:
    """Return whether an adapter changes what a linear map returns."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(config, "target_modules", None)
    return targets is not None and (targets == "all-linear" or bool(check_target_module_exists(config, name)))


def _wrap_inject_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        others = {name: other for name, other in self.peft_config.items() if name != adapter_name}
        # With another adapter's own config, TRL makes its copy for reference, whose parameters it copies afterwards.
        twin = next((name for name, other in others.items() if other is config), None)
        needs = config.__dict__.get(NEEDS)
        if isinstance(needs, AdapterRecord):
            prepare_base(model, needs, _WHERE)
        elif needs is not None and not is_symphonized(model):
            symphonize(model, needs)  # type: ignore[arg-type]
        elif NEEDS not in config.__dict__:
            config = self.peft_config[adapter_name] = _config_of_new(model, config, list(others))
        made = original(self, model, adapter_name, *args, **kwargs)
        if is_symphonized(model):
            for tracker in trackers_of(model):
                tracker.checks.recheck_adapters()
        mode = graphs_in_adapter(model, adapter_name)
        if mode is not None and kept_record(config) is None:
            keep_record(config, AdapterRecord.of(model, mode))
        if mode is not None and twin is not None:
            copy_graphs(model, twin, adapter_name)
        return made

    inject_adapter._symphony_wrap = True  # type: ignore[attr-defined]
    return inject_adapter


def _wrap_add_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if peft_config.is_prompt_learning and not peft_config.inference_mode:
            _check_prompts(self.base_model, peft_config)
        original(self, adapter_name, peft_config, *args, **kwargs)

    add_adapter._symphony_wrap = True  # type: ignore[attr-defined]
    return add_adapter


def _check_prompts(model: nn.Module, config: Any) -> None:
    """Check what the training of prompts would move in the base model, and not save with the prompts.

    Raises:
        PatchError: If these are the correction biases, by which routers choose.
    """
    if not is_symphonized(model):
        return
    every, kind = [tracker.config for tracker in trackers_of(model)], config.peft_type.value
    if any(settings.balance == "bias" for settings in every):
        raise PatchError(
            f"{kind} has no place for the routers' correction biases, which balance='bias' moves in the base model: "
            "they would not be saved with the adapter. Symphonize with balance='loss', or train the routers with "
            "`symphony_hf.lora_config(model, router='train')`"
        )
    if any(settings.counts_selections and settings.decay < 1 for settings in every):
        warnings.warn(
            f"{kind} has no place for the graphs, which training moves in the base model: they are not saved with the "
            "adapter. Save the base model too, keep its graphs as they are (symphonize with graph=PATH, decay=1), or "
            "train LoRA with `symphony_hf.lora_config`",
            SymphonyWarning,
            stacklevel=4,
        )
