"""PEFT's own ways of loading and making adapters, which bring the graphs: `PeftModel.from_pretrained`, TRL's scripts.

Two methods of PEFT are wrapped, and act only on adapters with graphs and on Symphony models: `from_peft_type` makes the
config of a saved adapter, without the mark in its file, and `inject_adapter` puts an adapter into a model. The model is
symphonized first, if the adapter was saved with graphs; a new adapter of a Symphony model gets a copy of its graphs and
a record of this model, on a copy of its config: one config may be used for several models.
"""

import functools
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.marks import MARK, unmark
from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import SymphonyWarning
from symphony_hf.files import ADAPTER_CONFIG
from symphony_hf.patching.symphonize import is_symphonized, symphonize, symphony_routers

from .loading import prepare_base
from .record import (
    NEEDS,
    AdapterRecord,
    copy_graphs,
    graphs_in_adapter,
    has_record,
    keep_record,
    without_record,
)

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


def _config_of_new(model: nn.Module, config: Any, others: list[str]) -> Any:
    """Return the config of a new adapter of this model, whatever other models it was used for."""
    if is_symphonized(model):
        config = without_record(config)
        _name_graphs(model, config, others)
    elif has_record(config):
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
    if any(graphs_in_adapter(model, other) == "train" for other in others):
        return  # PEFT cannot hold a router in one adapter and its graph alone in another
    named = list(config.modules_to_save or ())
    routers = [name for name, _ in symphony_routers(model)]
    if any(isinstance(router, nn.Linear) and _is_target(config, name) for name, router in symphony_routers(model)):
        return  # refused by the first forward, with the reason
    if not any(f"{name}.symphony".endswith(end) or name.endswith(end) for name in routers for end in named):
        config.modules_to_save = [*named, "symphony"]


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
        mode = graphs_in_adapter(model, adapter_name)
        if mode is not None and not has_record(config):
            keep_record(config, AdapterRecord.of(model, mode))
        if mode is not None and twin is not None:
            copy_graphs(model, twin, adapter_name)
        return made

    inject_adapter._symphony_wrap = True  # type: ignore[attr-defined]
    return inject_adapter
