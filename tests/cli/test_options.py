"""Commands keep their options and defaults, and options that come from a settings class are read as its types."""

import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from symphony_hf import cli
from symphony_hf.cli import app
from symphony_hf.cli.app import command_from
from symphony_hf.cli.convert import _file_size
from symphony_hf.errors import ConfigError

OPTIONS = json.loads((Path(__file__).parent / "options.json").read_text())
"""Arguments and options with defaults, by command. Entries may only be added, since scripts rely on them."""


def all_commands(group, prefix=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(all_commands(typer.main.get_command(app)))


def options_of(name):
    found = {
        "/".join([*one.opts, *one.secondary_opts]): "required" if one.required else one.default
        for one in COMMANDS[name].params
    }
    return json.loads(json.dumps(found, default=str))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_there_with_its_default(name):
    assert options_of(name) == OPTIONS[name]


def test_every_command_is_listed():
    missing = {name: options_of(name) for name in COMMANDS if name not in OPTIONS}
    assert not missing, f"add to {Path(__file__).parent.name}/options.json: {json.dumps(missing, indent=2)}"
    assert set(OPTIONS) <= set(COMMANDS)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_help_text(name):
    assert all(one.help for one in COMMANDS[name].params)


@dataclasses.dataclass(kw_only=True)
class Base:
    """Base settings.

    Args:
        model: Name of
            the model.
        sizes: Sizes.
    """

    model: str
    sizes: Sequence[int] | None = (1, 2)


@dataclasses.dataclass(kw_only=True)
class Example(Base):
    """Example settings.

    Args:
        names: Names of attacks.
        others: Other models.
        layers: Layers, or `all`.
        check: Whether to check.
        folder: Output folder.
        scale: Scale for tests.
        most: Maximum number; None for all.
        size: Size, or a number of bytes.

    Raises:
        ConfigError: Never.
    """

    names: Sequence[str] | None = None
    others: Sequence[str] = ()
    layers: str | Sequence[int] = "all"
    check: bool = True
    folder: str | None = None
    scale: int = 1
    most: int | None = 5
    size: int | str = "5GB"


def run(*words):
    seen = []
    example = typer.Typer()

    @example.command()
    @command_from(
        Example,
        arguments=("model",),
        required=("folder",),
        names={"names": "name", "others": "against"},
        flags={"check": "--check/--no_check"},
        repeated=("others",),
        left_out=("scale",),
        parsers={"size": _file_size},
    )
    def show(settings: Example) -> None:
        """Show them."""
        seen.append(settings)

    result = CliRunner().invoke(example, list(words))
    return result, seen


def test_values_are_read_as_the_types_of_the_settings():
    given = ["m", "--folder", "f", "--sizes", "3, 4", "--name", "a,b", "--against", "x", "--against", "y,z"]
    result, seen = run(*given, "--layers", "0,2", "--no_check")
    assert result.exit_code == 0, result.output
    assert seen == [
        Example(
            model="m",
            folder="f",
            sizes=(3, 4),
            names=("a", "b"),
            others=("x", "y,z"),
            layers=(0, 2),
            check=False,
            size=5 * 10**9,
        )
    ]


@pytest.mark.parametrize("text", ["all", "none", "None"])
def test_a_number_that_may_be_none_can_be_given_none(text):
    assert run("m", "--folder", "f", "--most", text)[1][0].most is None
    assert run("m", "--folder", "f", "--most", "7")[1][0].most == 7
    result, _ = run("m", "--folder", "f", "--most", "many")
    assert result.exit_code == 2
    assert "neither a whole number nor `none`" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("text", "size"), [("5000000000", 5 * 10**9), ("2GiB", 2**31)])
def test_sizes_of_files_are_numbers_of_bytes(text, size):
    assert run("m", "--folder", "f", "--size", text)[1][0].size == size


@pytest.mark.parametrize("text", ["big", "0"])
def test_no_size_is_refused_before_anything_is_loaded(text):
    for words in (["fold", "here", "there"], ["upcycle", "here", "there"]):
        result = CliRunner().invoke(app, [*words, "--max_shard_size", text])
        assert isinstance(result.exception, ConfigError)
        assert f"symphony {words[0]}: --max_shard_size `{text}" in str(result.exception)


def test_a_revision_is_not_of_a_recipe():
    result = CliRunner().invoke(app, ["inspect", "recipe.yaml", "--revision", "main"])
    assert isinstance(result.exception, ConfigError)
    assert "set `model.revision` in `recipe.yaml`" in str(result.exception)


@pytest.mark.parametrize(
    "words",
    ["inspect --four-bit", "upcycle --no-check --no-overwrite", "attack --no-overwrite", "fold --max-shard-size 1GB"],
)
def test_dashes_in_the_name_of_an_option_are_underscores(words):
    """Some options had dashes at first."""
    name, *options = words.split()
    for given in (options, [option.replace("-", "_").replace("__", "--", 1) for option in options]):
        result = CliRunner().invoke(app, [name, *given, "--help"])
        assert result.exit_code == 0, result.output
        assert options[0].replace("-", "_").replace("__", "--", 1) in result.output


def test_an_error_is_printed_in_one_line(monkeypatch, capsys):
    def fail():
        raise ConfigError("recipe `r.yaml` is not valid YAML: mapping\n  in line 1,\n\n    ^")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "error: recipe `r.yaml` is not valid YAML: mapping in line 1, ^\n"


def test_defaults_are_those_of_the_settings():
    _, seen = run("m", "--folder", "f")
    assert [dataclasses.replace(one, size="5GB") for one in seen] == [Example(model="m", folder="f")]
    assert seen[0].size == 5 * 10**9


def test_text_stays_text_where_the_settings_take_both():
    _, seen = run("m", "--folder", "f", "--layers", "every-other")
    assert seen[0].layers == "every-other"


def test_a_missing_required_option_is_refused():
    result, seen = run("m")
    assert result.exit_code == 2
    assert "--folder" in result.output
    assert not seen


def test_parameters_without_an_option_keep_their_defaults():
    result, seen = run("m", "--folder", "f", "--scale", "2")
    assert result.exit_code == 2
    assert not seen
    assert run("m", "--folder", "f")[1][0].scale == 1


def test_invalid_numbers_are_refused():
    result, _ = run("m", "--folder", "f", "--sizes", "1,two")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "symphony show: --sizes takes numbers with commas between them, got '1,two'"


def test_help_comes_from_the_docstrings_of_the_class_and_its_base():
    result, _ = run("--help")
    assert "Name of the model." in result.output
    assert "Layers, or all." in result.output
    assert "Maximum number; none for all." in " ".join(result.output.replace("│", " ").split())
    assert "ConfigError" not in result.output


def test_importing_the_commands_loads_no_trainer(plain_python):
    """The options of each command are made from what it calls, which is imported for that, also for `--help`."""
    script = (
        "import sys, symphony_hf.cli; "
        "heavy = ('peft', 'bitsandbytes', 'transformers.trainer', 'transformers.trainer_utils', 'datasets', 'trl', "
        "'matplotlib', 'deepspeed'); "
        "print([module for module in heavy if module in sys.modules])"
    )
    assert ast.literal_eval(plain_python(script)) == []


def test_the_checks_say_what_they_check():
    result = CliRunner().invoke(app, ["--help"])
    assert "Check the method: distributed training, full-size" in " ".join(result.output.replace("│", " ").split())
