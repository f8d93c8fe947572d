"""Load symphony_hf when a Symphony checkpoint or adapter is read, also in programs that do not import it.

`import torch` calls `install`, an entry point of the group `torch.backends`. From then on, transformers' and PEFT's
readers of configs import symphony_hf when a config asks for it, and no other time. This module stands outside the
package because importing it must cost nothing. `SYMPHONY_HF_AUTOLOAD=0` switches it off; Symphony checkpoints are then
refused unless symphony_hf was imported.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

_ENTRIES = ("symphony_hf", "symphony", "upcycled")
"""Entries of the configs that need symphony_hf; those of the first releases have no `symphony_hf`."""

_MODEL_TYPES = ("wikitext_moe",)
"""Model types that symphony_hf adds to transformers' Auto classes."""


def install() -> None:
    """Make transformers and PEFT import symphony_hf when a config asks for it, once each of them is imported."""
    if os.environ.get("SYMPHONY_HF_AUTOLOAD", "1") != "0":
        when_defined("transformers.configuration_utils", "PreTrainedConfig", _watch_models)
        when_defined("peft.config", "PeftConfigMixin", _watch_adapters)


def when_defined(module: str, name: str, action: Callable[[Any], None]) -> None:
    """Call `action` with a module's attribute: now, or at the first import that begins after it is defined."""
    value = getattr(sys.modules.get(module), name, None)
    if value is not None:
        action(value)
    else:
        sys.meta_path.insert(0, _Watcher(module, name, action))


class _Watcher:
    """A finder that finds nothing. transformers may be in the middle of its own import when torch is imported."""

    def __init__(self, module: str, name: str, action: Callable[[Any], None]) -> None:
        self.wanted = module, name, action

    def find_spec(self, *args: Any) -> None:
        module, name, action = self.wanted
        if hasattr(sys.modules.get(module), name) and self in sys.meta_path:
            # Another list: the import that asks goes through this one, and would pass over the next finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
            action(getattr(sys.modules[module], name))


def _watch_models(configs: Any) -> None:
    original = configs._dict_from_json_file.__func__

    def _dict_from_json_file(cls: Any, json_file: Any) -> Any:
        is_last = configs._dict_from_json_file.__func__ is _dict_from_json_file
        values = original(cls, json_file)
        return cls._dict_from_json_file(json_file) if _imported_for(values, is_last) else values

    configs._dict_from_json_file = classmethod(_dict_from_json_file)


def _watch_adapters(configs: Any) -> None:
    original = configs.from_peft_type.__func__

    def from_peft_type(cls: Any, **values: Any) -> Any:
        is_last = configs.from_peft_type.__func__ is from_peft_type
        return cls.from_peft_type(**values) if _imported_for(values, is_last) else original(cls, **values)

    configs.from_peft_type = classmethod(from_peft_type)


def _imported_for(values: Any, is_last: bool) -> bool:
    """Import symphony_hf if a config asks for it. Return whether it now wraps the reader, and did not before.

    Args:
        values: The config.
        is_last: Whether the reader was not wrapped before. Another thread may have begun to import symphony_hf, which
            is in `sys.modules` then; the import here waits for it.
    """
    if ("symphony_hf" in sys.modules and not is_last) or not isinstance(values, dict):
        return False
    if not (any(name in values for name in _ENTRIES) or values.get("model_type") in _MODEL_TYPES):
        return False
    import symphony_hf  # noqa: F401

    return True
