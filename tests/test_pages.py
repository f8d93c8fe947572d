"""The pages: links lead somewhere, code runs, commands parse, git ignores what they write, and the README is short."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from models import make_ids, make_llava, make_model
from pages import (
    NOTEBOOKS,
    PAGES,
    README,
    ROOT,
    code_of,
    commands_inline_of,
    headings_of,
    inline_of,
    links_of,
    name_of,
    pages_of,
    tokens_of,
)
from trainers import Rows
from transformers import AutoModelForCausalLM, TrainingArguments

from symphony_hf import symphonize
from symphony_hf.cli import app
from symphony_hf.conversion.compression.top_k import RESULT_FILE
from symphony_hf.errors import ConfigError
from symphony_hf.experiments.bench.gpu import measure
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.recipe import OutputSection, load_recipe
from symphony_hf.train import parse_overrides
from symphony_hf.training.arguments import training_arguments

MARKS = ("needs a GPU", "needs the network")
"""Comments above code that no test runs."""

OTHER_PROGRAMS = (
    *("cp", "mkdir", "source"),
    *(".ci/clients", "git", "hf", "jupyter", "mypy", "pip", "pre-commit", "pytest", "python", "ruff"),
)
OPEN_ENDED = ("train", "plan")
"""Commands that take any setting of a recipe as an option."""

ON_THIS_MACHINE = {
    "bf16": False,
    "use_cpu": True,
    "optim": "adamw_torch",
    "launch.processes": None,
    "launch.strategy": None,
    "model.quantization": None,
}
"""Settings of a recipe in the place of those that only its GPUs and their libraries have."""

HUB_NAME = "allenai/OLMoE-1B-7B-0924"

PYTHON = [code for page in PAGES for code in code_of(page, "python") if code.name not in MARKS]
BASH = [code for page in PAGES for code in code_of(page, "bash") if code.name not in MARKS]


# The README.


def test_the_readme_is_short_and_shows_a_picture_early():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200
    pictures = [token.map[0] + 1 for token in tokens_of(README) if "![" in token.content]
    assert pictures
    assert pictures[0] < 60


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(README) if "://" not in link}
    assert set(PAGES) - linked - {README} == set()


def test_pages_that_a_notebook_writes_are_not_the_projects(tmp_path):
    for name in ("README.md", "notebooks/README.md", "recipes/mine/README.md", "notebooks/notebook-05/final/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(page.relative_to(tmp_path)) for page in pages_of(tmp_path)]
    assert found == ["README.md", "notebooks/README.md", "recipes/mine/README.md"]


# Links.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in links_of(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in headings_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_have_no_html_but_comments(page):
    """Links and code in HTML would escape the other tests."""
    html = [token.content for token in tokens_of(page) if token.type == "html_block"]
    assert all(text.startswith("<!--") for text in html), html


def test_files_that_pages_name_exist():
    """Paths in code spans and code blocks that begin with a folder of the project."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/.-])((?:recipes|symphony_hf|tests|notebooks)/[\w./-]*[\w/])", text):
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


# Python.


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Tiny checkpoints in the place of those on the Hub and of the quickstart, files and names that examples take."""
    monkeypatch.chdir(tmp_path)
    with ZipFile("brown.zip", "w") as archive:
        for name in ("brown/README", *(f"brown/c{genre}{number:02}" for genre in "ajkr" for number in range(1, 10))):
            archive.writestr(name, "The/at ship/nn drifts/vbz\n")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    make_model(pad_token_id=None, **sizes).save_pretrained(tmp_path / HUB_NAME)
    symphonize(make_model()).save_pretrained(tmp_path / "symphony-quickstart" / "symphony")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        max_steps=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    return {"arguments": arguments, "dataset": Rows(make_ids(8)), "model": make_llava()}


@pytest.mark.parametrize("code", PYTHON, ids=str)
def test_python_runs(code, stand_ins):
    names = dict(stand_ins)
    with quiet():  # PEFT and Transformers warn about each other
        exec(compile(code.text, str(code), "exec"), names)
    assert names.keys() > stand_ins.keys()


def test_the_first_example_serves_a_plain_checkpoint(stand_ins):
    (code,) = code_of(README, "python")
    exec(compile(code.text, str(code), "exec"), names := dict(stand_ins))
    assert type(names["model"]).__name__ == "OlmoeForCausalLM"
    served = AutoModelForCausalLM.from_pretrained("served")
    assert not any("symphony" in name for name in served.state_dict())
    trained = next(module.symphony for module in names["model"].modules() if hasattr(module, "symphony"))
    assert (trained.adjacency - trained.adjacency.diag().diag()).sum() > 0
    assert torch.isfinite(served(make_ids()).logits).all()


# Commands.


def words_of(code):
    """Each command of a code block as words: continued lines joined, without comments and variables in front."""
    for line in code.text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            words = list(itertools.dropwhile(lambda word: re.fullmatch(r"\w+=.*", word), words))
            if words:
                yield words


def command_of(words):
    """The command of `symphony` that words name, and the words after it."""
    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command, words


def commands_of(group):
    for command in group.commands.values():
        yield from commands_of(command) if hasattr(command, "commands") else [command]


@pytest.mark.parametrize("command", list(commands_of(typer.main.get_command(app))), ids=lambda command: command.name)
def test_examples_of_help_texts_parse(command, monkeypatch):
    """One in each paragraph."""
    monkeypatch.chdir(ROOT)
    for example in re.sub("^Examples?: ", "", command.epilog).split("\n\n"):
        check_command(shlex.split(example))


def check_symphony(words):
    command, rest = command_of(words)
    context = command.make_context(command.name, rest)
    if command.name in OPEN_ENDED:
        check_recipe([context.params["recipe"], *context.args])
    else:
        assert not context.args


def check_recipe(words):
    path, *overrides = (word for word in words if word != "--dry_run")
    recipe = load_recipe(ROOT / path, {**parse_overrides(overrides), **ON_THIS_MACHINE})
    training_arguments(recipe)


def check_launch(words):
    launch = launch_command_parser().parse_args(words)
    assert launch.module
    assert launch.config_file is None or (ROOT / launch.config_file).exists()
    check_module([launch.training_script, *launch.training_script_args])


def check_module(words):
    module, *rest = words
    if module == "symphony_hf.train":
        check_recipe(rest)
    elif module == "symphony_hf.experiments.bench.gpu.measure":
        measure.parse([*rest, "--tiny"])  # which asks for no GPU
    else:
        assert not module.startswith("symphony_hf"), module


def check_command(words):
    if words[0] == "symphony":
        check_symphony(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(words[2:])
    elif words[:2] == ["python", "-m"]:
        check_module(words[2:])
    else:
        assert words[0] in OTHER_PROGRAMS, words


@pytest.mark.parametrize("code", BASH, ids=str)
def test_commands_parse(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in words_of(code):
        check_command(words)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_commands_within_sentences_have_the_options_that_they_name(page):
    for span in commands_inline_of(page):
        words = shlex.split(span)
        if words[0] != "symphony":
            continue
        command, rest = command_of(words[1:])
        if command.name in OPEN_ENDED and rest and (ROOT / rest[0]).exists():
            check_symphony(words[1:])
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = {word for word in rest if word.startswith("--")} - known
        assert not unknown or command.name in OPEN_ENDED, f"{span}: {unknown}"


@pytest.mark.parametrize(
    ("line", "error", "match"),
    [
        ("symphony evaluate model", KeyError, "evaluate"),
        ("symphony eval model --atack aaa", Exception, "No such option: --atack"),
        ("symphony merge model", Exception, "Missing"),
        ("symphony train recipes/quickstart/config.yaml --max_stepz 2", ConfigError, "max_steps"),
        ("symphony train recipes/quickstart/missing.yaml", ConfigError, "missing.yaml"),
        ("python -m symphony_hf.training", AssertionError, "symphony_hf.training"),
        ("make test", AssertionError, "make"),
    ],
)
def test_a_wrong_command_is_found(line, error, match):
    with pytest.raises(error, match=match):
        check_command(shlex.split(line))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_pages_install_the_package_from_the_clone(page):
    """In one form, with extras that exist. By its name, the package can only be installed once it is published."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = ", project.split("\n[")[0], re.M))
    spans = [token.content for token in inline_of(page) if token.type == "code_inline"]
    for text in [*spans, *(code.text for code in code_of(page))]:
        for command in re.findall(r"pip install[^\n&#]*", text):
            assert "symphony" not in command, f'{command}: write `pip install -e ".[EXTRA]"`'
            for names in re.findall(r"\.\[(.*?)\]", command):
                assert set(names.split(",")) <= extras, command


def test_the_readme_says_where_the_package_is_installed_from():
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert "Until it is on PyPI, install from a clone" in text


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, *sorted((ROOT / "recipes").rglob("*.yaml"))], ids=name_of)
def test_a_run_without_a_launcher_has_one_spelling(path):
    assert "python -m symphony_hf.train " not in path.read_text(encoding="utf-8"), "write `symphony train`"


# Outputs.

WHERE = ("output", "target", "json")
"""Parameters of commands that say where they write."""


def default_outputs():
    """Where commands, recipes and notebooks write by default."""
    for command in commands_of(typer.main.get_command(app)):
        yield from (one.default for one in command.params if one.name in WHERE and not one.required and one.default)
    yield RESULT_FILE
    yield measure.parse(["--tiny"]).output
    yield OutputSection().directory
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        if path.parent.name != "accelerate":
            yield load_recipe(path).output.directory
    for notebook in NOTEBOOKS:
        yield f"notebooks/notebook-{notebook.name[:2]}"


def outputs_of(words):
    """Where a command of a page writes, as far as its words or its defaults say."""
    if words[0] == ".ci/clients":
        yield words[1]
    elif "symphony_hf.train" in words:
        yield recipe_output(words[words.index("symphony_hf.train") + 1 :])
    elif words[0] == "symphony":
        command, rest = command_of(words[1:])
        context = command.make_context(command.name, rest)
        if command.name == "train":
            yield recipe_output([context.params["recipe"], *context.args])
        yield from (context.params[name] for name in WHERE if context.params.get(name))


def recipe_output(words):
    path, *overrides = (word for word in words if word != "--dry_run")
    return load_recipe(ROOT / path, parse_overrides(overrides)).output.directory


def ignored_of(paths, folder):
    """The paths that git ignores in a clone, by the project's file alone."""
    shutil.copy(ROOT / ".gitignore", folder)
    subprocess.run(["git", "init", "--quiet", folder], check=True, timeout=30)
    command = ["git", "-c", f"core.excludesFile={os.devnull}", "check-ignore", "--no-index", "--stdin"]
    lines = "".join(f"{path}\n" for path in paths)
    run = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, timeout=30)
    assert not run.stderr
    return set(run.stdout.splitlines())


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@needs_git
def test_git_ignores_what_commands_write(tmp_path, monkeypatch):
    """By default, and where the pages' commands say."""
    monkeypatch.chdir(ROOT)
    shown = [output for code in BASH for words in words_of(code) for output in outputs_of(words)]
    paths = {str(path) for path in [*default_outputs(), *shown] if not Path(path).is_absolute()}
    assert {"symphony-quickstart", "runs/symphony", "report.html", "text"} <= paths
    assert paths - ignored_of(sorted(paths), tmp_path) == set()


@needs_git
def test_git_ignores_no_file_of_the_project(tmp_path):
    kinds = (("symphony_hf", "py"), ("tests", "py"), ("recipes", "yaml"), ("recipes", "json"))
    files = [*PAGES, *NOTEBOOKS, *(path for folder, kind in kinds for path in (ROOT / folder).rglob(f"*.{kind}"))]
    assert ignored_of([name_of(path) for path in files], tmp_path) == set()
