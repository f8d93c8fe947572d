"""Settings by name, as a YAML file or a command line has them, into typed ones."""

import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigError, nearest


def check_names(settings: Any, known: Iterable[str] | None, where: str) -> dict[str, Any]:
    """Settings by name, with known names alone.

    Args:
        settings: What should be settings by name.
        known: Names; any when None.
        where: What they are, for the error message: "recipe.yaml: data".

    Raises:
        ConfigError: If they are no mapping, or a name is not known; it says which known one is nearest.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: expected settings by name, got {settings!r}")
    known = None if known is None else list(known)
    for name in settings:
        if known is not None and name not in known:
            raise ConfigError(f"{where}: unknown setting `{name}`; {nearest(str(name), known)}")
    return dict(settings)


def parse_settings(cls: type, settings: Mapping[str, Any], where: str, **fixed: Any) -> Any:
    """Build a dataclass from settings by name, each read as its field's type: `1e-4`, which is text to YAML, too.

    Args:
        cls: The dataclass, ours or another library's.
        settings: Its fields by name.
        where: What they are, for the error message.
        **fixed: Fields that `settings` may change.

    Raises:
        ConfigError: If a name is not known, a value is not of its type, or the dataclass refuses it.
    """
    from jsonargparse import ArgumentError, ArgumentParser  # here: `import symphony_hf` comes by, and need not wait

    settings = check_names(settings, inspect.signature(cls).parameters, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    try:
        values = parser.parse_object({"settings": {**fixed, **settings}})
        return parser.instantiate(values).settings
    except ArgumentError as error:
        named = re.search(r'Parser key "settings\.(\w+)', str(error))
        problem = str(error) if named is None else _of_wrong_type(cls, named.group(1), settings)
        raise ConfigError(f"{where}: {problem}") from error
    except (ValueError, TypeError) as error:  # ConfigError is one, of our own dataclasses
        raise ConfigError(f"{where}: {error}") from error


def _of_wrong_type(cls: type, name: str, settings: Mapping[str, Any]) -> str:
    wanted, got = typing.get_type_hints(cls)[name], settings.get(name)
    is_union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    kinds = typing.get_args(wanted) if is_union else (wanted,)
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if words:
        return f"`{name}` is {got!r}; {nearest(str(got), words)}"
    names = ("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    return f"`{name}` must be {' or '.join(names)}, got {got!r}"
