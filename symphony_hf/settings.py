"""Strict parsing of settings into dataclasses, and settings as the options of a command."""

import dataclasses
import functools
import inspect
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, nearest


def check_names(settings: Any, known: Iterable[str] | None, where: str) -> dict[str, Any]:
    """Return settings by name as a dictionary; any name is known if `known` is None.

    Raises ConfigError if they are no mapping, or a name is unknown, with the most similar known name. `where` describes
    them in the message, such as "recipe.yaml: data".
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: expected settings by name, got {settings!r}")
    known = None if known is None else list(known)
    for name in settings:
        if known is not None and name not in known:
            raise ConfigError(f"{where}: unknown setting `{name}`; {nearest(str(name), known)}")
    return dict(settings)


def parse_settings(cls: type, settings: Mapping[str, Any], where: str, **defaults: Any) -> Any:
    """Build a dataclass from settings, converting each to the type of its field, such as `1e-4`, a string in YAML.

    Args:
        cls: Dataclass of this package or of another library.
        settings: Values of fields by name.
        where: Description of the settings for the error message.
        **defaults: Values of fields that are not in `settings`.

    Raises:
        ConfigError: If a name is unknown, a value has the wrong type, or the dataclass refuses it.
    """
    values = convert_settings(cls, {**defaults, **check_names(settings, None, where)}, where)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # including the ConfigErrors of our dataclasses
        raise ConfigError(f"{where}: {error}") from error


def convert_settings(cls: type, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings converted to the types of a dataclass's fields, without building it.

    A value of one of the plain types of its field stays as it is, so that a quoted text is not read as YAML again. A
    whole number such as `1e3` is an integer.

    Raises:
        ConfigError: If a name is unknown, or a value has the wrong type.
    """
    from jsonargparse import ArgumentError  # slow to import, and not needed by `import symphony_hf`

    parameters, (parser, kinds) = inspect.signature(cls).parameters, _parser_of(cls)
    given = {name: _whole(value, kinds[name]) for name, value in check_names(settings, parameters, where).items()}
    for name, value in given.items():
        if value is None and not _has_type(None, kinds[name]) and parameters[name].default is not None:
            raise ConfigError(f"{where}: {_of_wrong_type(kinds[name], name, value)}")
    others = {name: value for name, value in given.items() if not _has_type(value, kinds[name])}
    try:
        values = parser.instantiate(parser.parse_object({"settings": others})).settings if others else {}
    except (ArgumentError, ValueError, TypeError) as error:
        named = re.search(r'Parser key "settings\.(\w+)', str(error))
        problem = str(error) if named is None else _of_wrong_type(kinds[named[1]], named[1], settings.get(named[1]))
        raise ConfigError(f"{where}: {problem}") from error
    return given | {name: values[name] for name in others}


def _has_type(value: Any, kinds: Sequence[Any]) -> bool:
    return type(value) in kinds or Any in kinds or (isinstance(value, dict) and dict[str, Any] in kinds)


def _whole(value: Any, kinds: Sequence[Any]) -> Any:
    """Return a whole number such as `1e3`, which YAML reads as a float, as an integer where the type has no other."""
    if int not in kinds or float in kinds or str in kinds or not isinstance(value, float | str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


@functools.cache
def _parser_of(cls: type) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """Return a parser of a class's settings, and the types that each of them may have.

    They are those that the class annotates: HfArgumentParser changes the fields' own, so that a class that inherits
    them after a script was parsed has others.
    """
    from jsonargparse import ArgumentParser

    parser, hints, kinds = ArgumentParser(exit_on_error=False), typing.get_type_hints(cls), {}
    for name in inspect.signature(cls).parameters:
        parser.add_argument(f"--settings.{name}", type=hints[name])
        is_union = typing.get_origin(hints[name]) in (typing.Union, types.UnionType)
        kinds[name] = typing.get_args(hints[name]) if is_union else (hints[name],)
    return parser, kinds


def _of_wrong_type(kinds: Sequence[Any], name: str, got: Any) -> str:
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if words:
        return f"`{name}` is {got!r}; {nearest(str(got), words)}"
    names = ("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    return f"`{name}` must be {' or '.join(names)}, got {got!r}"


def from_mapping(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from values of its fields by name.

    Raises ConfigError if `values` is not a mapping, has an unknown key, or lacks a required one.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = check_names(values, fields, where)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise ConfigError(f"{where}: `{name}` is missing")
    return cls(**values)


class _Loader(yaml.SafeLoader):
    """Loader for which `2025-06-01` is text, since a run may be named so, and `1e-5` a number, as in YAML 1.2.

    A key that is given twice is an error, since PyYAML keeps the last one and drops the others. Merge keys (`<<`) may
    be repeated, and what they merge may be given again.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping before anything is merged into it, and check its keys."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"`{key.value}` is given twice, on lines {lines[name]} and {line}: keep one")
            lines[name] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(source: Path | str, where: str) -> Any:
    """Read a YAML file, or the text of a value. `where` begins the error message."""
    try:
        return yaml.load(source.read_text(encoding="utf-8") if isinstance(source, Path) else source, _Loader)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def read_option(option: str, value: str) -> Any:
    """Read the value of a command-line option, in YAML. `option` begins the error message.

    Raises:
        ConfigError: If it is empty, which an unset variable of a shell is, ends in a comment, or is not valid YAML.
    """
    if not value.strip():
        raise ConfigError(f"{option} has no value: give one, or write null")
    where = f"{option}: `{value}`"
    read = read_yaml(value, where)
    # The tokens that end a block or the text have no characters of their own: they stand behind the comment.
    empty = (yaml.BlockEndToken, yaml.StreamEndToken)
    ends = [token.end_mark.index for token in yaml.scan(value, _Loader) if not isinstance(token, empty)]
    if "#" in value[max(ends) :]:
        raise ConfigError(f"{where}: `#` begins a comment in YAML: quote the value once more, as in '\"a #1.txt\"'")
    return read


def check_least(where: str, least: int, **values: int | None) -> None:
    """Refuse settings below `least`. Those that are None are not checked."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{where}: `{name}` must be at least {least}, got {value}")


def changed_settings(settings: Any) -> dict[str, Any]:
    """Return the fields of a settings dataclass that are not at their defaults, by name."""
    values = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return {field.name: value for field, value in values if value != field.default}


def command_line(command: str, *arguments: str, **options: Any) -> str:
    """Return a `symphony` command, quoted for a shell. The values of a sequence are separated by commas."""
    words = ["symphony", command, *arguments]
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", text]
    return shlex.join(words)
