"""Sections of a recipe's YAML file, merged over those of its base, before they are checked."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, nearest
from .settings import check_names, read_yaml

OPTIONAL = ("symphony", "peft")
"""Sections that a recipe may do without. `null` and `false` both mean none."""

_PATHS = {
    "model": ("path", "tokenizer", "vision"),
    "symphony": ("graph",),
    "train": ("resume_from_checkpoint",),
    "output": ("directory",),
}
"""Settings that may be local paths, in which `~` is expanded here. Those of `data` stay as they are, because a
checkpoint records them and a run that resumes must have the same; they are expanded where the data is read."""


def read_sections(path: Path, overrides: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Read the sections of a recipe: settings by name, or None for a section without any.

    Args:
        path: Path of the YAML file.
        overrides: `section.name` -> value. A name without a section belongs to the train section.
        known: Names of all sections.

    Raises:
        ConfigError: If a file cannot be read, a section is unknown, or it is not settings by name.
    """
    values = _read(path, known, ())
    for name, value in overrides.items():
        section, _, setting = name.partition(".") if "." in name else ("train", "", name)
        _put(values, section, {setting: value}, path, known)
    for section, names in _PATHS.items():
        settings = values.get(section) or {}
        expanded = {name: os.path.expanduser(settings[name]) for name in names if isinstance(settings.get(name), str)}
        if expanded:
            values[section] = {**settings, **expanded}
    return values


def _read(path: Path, known: Sequence[str], seen: Sequence[Path]) -> dict[str, Any]:
    """Read the sections of a recipe, merged over those of its base."""
    if path.resolve() in seen:
        raise ConfigError(f"recipe `{path}`: it is its own `base`")
    given = read_yaml(path, f"recipe `{path}`")
    if not isinstance(given, dict):
        raise ConfigError(f"recipe `{path}`: expected sections by name, got {type(given).__name__}")
    base = given.pop("base", None)
    values = {} if base is None else _read(path.parent / str(base), known, [*seen, path.resolve()])
    for section, settings in given.items():
        _put(values, section, settings, path, known)
    return values


def _put(values: dict[str, Any], section: str, settings: Any, path: Path, known: Sequence[str]) -> None:
    """Merge settings into a section. None, or False for an optional section, removes those that are there."""
    if section not in known:
        raise ConfigError(f"recipe `{path}`: unknown section `{section}`; {nearest(str(section), known)}")
    if settings is None or (settings is False and section in OPTIONAL):
        values[section] = None
    else:
        given = check_names(settings, None, f"recipe `{path}`: {section}")
        values[section] = {**(values.get(section) or {}), **given}
