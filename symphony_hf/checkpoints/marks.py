"""Marks in the files of Symphony configs, which software without this package cannot mistake for a stock model's.

The marks are in the files alone: they are added when a config is written and removed when it is read, so that a config
in memory is its family's own, for weight conversion, PEFT, TRL and whatever else looks up classes by its names.
"""

import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from symphony_hf.compat import ENGINES
from symphony_hf.errors import ConfigError

MARK = "symphony_hf"
"""Model type in a file, and the entry with the values that the marks replace."""

NEEDED = "unreadable without symphony_hf: pip install symphony-hf"
"""Value of `dtype`, which transformers looks up in torch for every config, and shows in its error.

A class that is named in code only warns of another model type. Before 4.56 the name is `torch_dtype`."""

ARCHITECTURE_PREFIX = "Symphony"
"""Prefix of the class name in a file's `architectures`, for software that chooses classes of its own by it."""

CHOOSES_BY_MARK: dict[str, Callable[[], bool]] = dict.fromkeys(ENGINES, lambda: True)
"""Engine -> whether it looks up classes or tensor names by the marked `architectures`. With our SGLang plugin it does
not."""

_RECORDS = ("symphony", "upcycled")


def mark(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config with the marks of a Symphony model; unchanged if nothing in it is one."""
    if not _has_record(values):
        return values
    # Before a model's first save `architectures` is empty; nested configs, and configs saved on their own, take the
    # class from `model_class`.
    named = (values.get("symphony") or {}).get("model_class")
    classes = values.get("architectures") or ([] if named is None else [named])
    names = [ARCHITECTURE_PREFIX + name.removeprefix(ARCHITECTURE_PREFIX) for name in classes]  # also of a marked name
    marks = {"architectures": names, "model_type": MARK}
    return {**_mark_checked(values, {"model_type": values.get("model_type")}), **marks}


def _has_record(values: dict[str, Any]) -> bool:
    nested = (value for value in values.values() if isinstance(value, dict))
    return any(values.get(name) is not None for name in _RECORDS) or any(map(_has_record, nested))


def _mark_checked(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Mark what a class that is named in code reads: of a vision-language model's config also the nested one."""
    if not _has_record(values):
        return values
    marked = {name: _mark_checked(value, {}) if isinstance(value, dict) else value for name, value in values.items()}
    # In a further dict: transformers takes a nested dict with the right `model_type` for the config.
    replaced = {"replaced": own | {"dtype": values.get("dtype")}}
    return {**marked, "dtype": NEEDED, "torch_dtype": NEEDED, MARK: replaced}


def unmark(values: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Return the values of a config's file without the marks: its family's own, with our records.

    Files of format 1 have a mark in `architectures` alone. An engine that chooses classes of its own by
    `architectures` still finds the mark there; other readers in its process do not.

    Args:
        values: Values as written.
        where: The file, for error messages.

    Raises:
        ConfigError: If the values that the marks replaced are not those of a config.
    """
    if not (MARK in values or _has_record(values)):
        return values
    found = {name: unmark(value, where) if isinstance(value, dict) else value for name, value in values.items()}
    if MARK in values:
        found |= _replaced(found.pop(MARK), where)
        found.pop("torch_dtype", None)
    elif found.get("auto_map") == {}:
        del found["auto_map"]
    if isinstance(found.get("architectures"), list):
        found["architectures"] = [
            str(name).removeprefix(ARCHITECTURE_PREFIX) for name in found["architectures"]
        ] or None
    if "architectures" in values and any(CHOOSES_BY_MARK[engine]() for engine in _calling_engines()):
        found["architectures"] = values["architectures"]
    return found


def _calling_engines() -> set[str]:
    """Return the engines whose code is on the stack: trainers import vLLM, and read configs for themselves."""
    frames = (frame for frame, _ in traceback.walk_stack(None))
    return {str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames} & set(ENGINES)


def _replaced(entry: Any, where: str | Path) -> dict[str, Any]:
    replaced = entry.get("replaced") if isinstance(entry, dict) else None
    known = ("model_type", "dtype", "task_type")
    if not isinstance(replaced, dict) or any(
        name not in known or not isinstance(value, str | None) for name, value in replaced.items()
    ):
        raise ConfigError(
            f"`{where}`: `{MARK}` must hold the values that the marks of a Symphony checkpoint replaced, got "
            f"{entry!r}: restore the file as it was saved"
        )
    return replaced


def wrap_to_json_file(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method that writes a config's file, so that a Symphony model's is marked whoever writes it."""

    @functools.wraps(original)
    def to_json_file(self: PreTrainedConfig, json_file_path: Any, use_diff: bool = True) -> None:
        values = json.loads(self.to_json_string(use_diff))
        marked = mark(values)
        if marked is values:
            return original(self, json_file_path, use_diff)
        Path(json_file_path).write_text(json.dumps(marked, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    return to_json_file


def wrap_dict_from_json_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the method that reads a config's file, so that the config in memory has no marks."""

    @functools.wraps(original)
    def _dict_from_json_file(cls: type[PreTrainedConfig], json_file: Any) -> Any:
        values = original(cls, json_file)
        return unmark(values, json_file) if isinstance(values, dict) else values

    return _dict_from_json_file
