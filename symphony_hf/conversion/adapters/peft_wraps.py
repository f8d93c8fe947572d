"""PEFT's own ways of loading an adapter, which bring its graphs: `PeftModel.from_pretrained`, `model.load_adapter`, ...

Two methods of PEFT are wrapped, and act only on adapters with graphs: `from_peft_type` makes the config of a saved
adapter, without the mark in its file, and `inject_adapter` puts an adapter into a model, which is symphonized first.
"""

import functools
from typing import Any

from torch import nn

from symphony_hf.checkpoints.marks import MARK, unmark
from symphony_hf.config import SymphonyConfig
from symphony_hf.files import ADAPTER_CONFIG
from symphony_hf.patching.symphonize import is_symphonized, symphonize

from .loading import prepare_base
from .record import NEEDS, AdapterRecord, keep_record


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
            return original(cls, **values)
        entry, values = values.get(MARK), unmark(values, ADAPTER_CONFIG)
        where, settings = f"{ADAPTER_CONFIG}: {MARK}", values.pop("symphony", None)
        needs: Any = SymphonyConfig.from_stored(settings, f"{ADAPTER_CONFIG}: symphony")
        config = original(cls, **values)
        if entry is not None and "record" in entry:
            needs = AdapterRecord.parse(entry["record"], where)
            keep_record(config, needs)
        config.__dict__[NEEDS] = needs
        return config

    return from_peft_type


def _wrap_inject_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        needs = self.peft_config[adapter_name].__dict__.get(NEEDS)
        if isinstance(needs, AdapterRecord):
            prepare_base(model, needs, ADAPTER_CONFIG)
        elif needs is not None and not is_symphonized(model):
            symphonize(model, needs)  # type: ignore[arg-type]
        return original(self, model, adapter_name, *args, **kwargs)

    inject_adapter._symphony_wrap = True  # type: ignore[attr-defined]
    return inject_adapter
