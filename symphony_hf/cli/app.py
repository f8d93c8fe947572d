"""The typer app of all commands, and command options built from the function or class that a command calls."""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Union

import typer

from symphony_hf.errors import ConfigError

app = typer.Typer(
    help="Symphony routing for Hugging Face MoE models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("-", "_"),  # `--four-bit` is `--four_bit`
    },
)

_ENTRY = re.compile(r"    (\w+): (.+(?:\n     .*)*)")


def command_from(
    target: Callable[..., Any],
    *,
    arguments: Collection[str] = ("model",),
    required: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    repeated: Collection[str] = (),
    left_out: Collection[str] = (),
    parsers: Mapping[str, Callable[[str], Any]] | None = None,
) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a command one option for each parameter of `target`, and call it with what `target` returns.

    Names, types and defaults are those of the signature. Help texts are the entries under `Args:` of the docstring, and
    for a class of its base classes'. A sequence is one option whose values are separated by commas.

    Args:
        target: A settings class, or a function.
        arguments: Parameters that are positional on the command line.
        required: Parameters that the command requires although `target` has a default for them.
        names: Option names that differ from the names of their parameters.
        flags: Declarations of switches, such as `--check/--no_check`. One that is not given leaves a default of None.
        repeated: Sequences that are given as one argument or option for each value.
        left_out: Parameters without an option, which keep their defaults.
        parsers: Functions that read the values of options whose type does not say how. They may raise ConfigError.
    """
    names, flags, parsers = names or {}, flags or {}, parsers or {}
    texts = _argument_texts(target)
    hints = typing.get_type_hints(target if inspect.isfunction(target) else target.__init__)  # type: ignore[misc]
    options: dict[str, str] = {}
    parameters = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.name in left_out:
            continue
        name = names.get(parameter.name, parameter.name)
        options[name] = parameter.name
        kind, default = _without_none(hints[parameter.name]), parameter.default
        shown: Any = kind if kind in (int, float, bool) else str
        if parameter.name in required:
            default = inspect.Parameter.empty
        elif parameter.name in repeated:
            shown, default = list[str], None
        elif kind is bool:
            default = bool(default)
        elif isinstance(default, tuple):
            default = ",".join(map(str, default))
        text, parser = texts[parameter.name], None
        if kind in (int, float) and kind != hints[parameter.name] and default is not None:
            parser, text = functools.partial(_number_or_none, kind), text.replace("None", "none")
        info: Any = (
            typer.Argument(help=text)
            if parameter.name in arguments
            else typer.Option(flags.get(parameter.name, f"--{name}"), help=text, parser=parser)
        )
        shown = shown | None if default is None else shown
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[shown, info], default=default)
        )
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

    def decorate(run: Callable[[Any], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            given = {options[name]: value for name, value in values.items()}
            for name, option in ((options[name], name) for name in values):
                if name in repeated:
                    given[name] = tuple(given[name] or ())
                elif given[name] is False and NoneType in typing.get_args(hints[name]):
                    given[name] = None
                elif isinstance(given[name], str):
                    where = f"symphony {run.__name__.rstrip('_')}: --{option}"
                    try:
                        given[name] = parsers.get(name, functools.partial(_parse, hints[name]))(given[name])
                    except ConfigError as error:
                        raise ConfigError(f"{where} {error}") from error
            run(target(**given))

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _argument_texts(target: Callable[..., Any]) -> dict[str, str]:
    """Return each parameter's entry under `Args:` of the docstring, on one line."""
    texts: dict[str, str] = {}
    for owner in reversed(inspect.getmro(target)) if inspect.isclass(target) else (target,):
        _, _, rest = inspect.cleandoc(owner.__doc__ or "").partition("Args:\n")
        for name, text in _ENTRY.findall(rest.split("\n\n")[0]):
            texts[name] = " ".join(text.replace("`", "").split())
    return texts


def _without_none(kind: Any) -> Any:
    kinds = typing.get_args(kind)
    return Union[tuple(one for one in kinds if one is not NoneType)] if NoneType in kinds else kind  # noqa: UP007


def _number_or_none(kind: type, text: Any) -> Any:
    """Parse a number that may be None, which is written `none` or `all`. For typer, which passes defaults, too."""
    if str(text).lower() in ("none", "all"):
        return None
    try:
        return kind(text)
    except ValueError as error:
        number = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{text!r} is neither {number} nor `none`") from error


def _parse(kind: Any, text: str) -> Any:
    """Split a text at its commas where the type has a sequence.

    Raises:
        ConfigError: If the type is a sequence of numbers, and the text is something else.
    """
    kind = _without_none(kind)
    kinds = (kind,) if typing.get_origin(kind) in (Sequence, tuple) else typing.get_args(kind)
    sequence = next((one for one in kinds if typing.get_origin(one) in (Sequence, tuple)), None)
    if sequence is None:
        return text
    if int not in typing.get_args(sequence):
        return tuple(text.split(","))
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        if str in kinds:
            return text
        raise ConfigError(f"takes numbers with commas between them, got {text!r}") from error
