"""Levels, rooms and sizes: imports come from strictly lower levels in no circle, and files and packages have a size."""

import ast
import functools
import re
from pathlib import Path

import networkx
import pytest

import symphony_hf

ROOT = Path(symphony_hf.__file__).parent
ORDER = (
    ("errors", "compat", "allocator"),
    ("locks",),
    ("files", "tables", "settings"),
    ("config", "results", "recipe_files"),
    ("recipe",),
    ("routing",),
    ("models", "diagnostics"),
    ("data",),
    ("checkpoints",),
    ("patching",),
    ("evaluation", "serving"),
    ("conversion",),
    ("training",),
    ("train", "experiments"),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
WITHOUT_TRANSFORMERS = {"errors", "locks", "files", "results", "settings", "config", "recipe", "routing"}
WITHOUT_TRANSFORMERS |= {"allocator", "recipe_files"}
ONLY_IN = {  # rooms that may import it; True: inside functions alone
    "matplotlib": ({"diagnostics"}, False),
    "peft": ({"conversion", "training", "experiments"}, True),
    "deepspeed": ({"training", "experiments"}, True),
    "accelerate": ({"training", "experiments"}, True),
    "vllm": ({"serving"}, True),
    "sglang": ({"serving"}, True),
    "bitsandbytes": ({"conversion", "training", "experiments"}, True),
}
OWN_PROGRAMS = ("experiments/bench/gpu/",)
"""Run by themselves, so what they need may be imported at the top of their files."""

MODULES = sorted(path for path in ROOT.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def room_of(module):
    """The package or file right below symphony_hf; of the package itself, ``."""
    return [*module.split("."), ""][1]


@functools.cache
def imports_of(path):
    """List (module, whether at the top of the file) of every import, those for types alone included; all absolute."""
    return list(_imports_of(path))


def _imports_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set()
    for node in tree.body:
        top.update(id(inner) for inner in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = node.module
            if node.level:
                parts = list(path.relative_to(ROOT.parent).parts[:-1])
                base = ".".join([*parts[: len(parts) - (node.level - 1)], *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in NAMES else base), id(node) in top


def test_the_layers_on_the_page_are_these():
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Find your way\n(.*?)^## ", page, re.M | re.S)
    rows = re.findall(r"^\d+\. ([^:\n]*)", section, re.M)
    assert tuple(tuple(re.findall(r"`(\w+)`", row)) for row in rows) == ORDER


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_come_from_strictly_lower_levels(path):
    own = room_of(name_of(path))
    if not own:
        return
    assert own in LEVELS, f"{own} has no level: give it one"
    for module, _ in imports_of(path):
        if module.split(".")[0] == "symphony_hf":
            other = room_of(module)
            if other != own:
                assert other, f"{path.name} imports symphony_hf itself: import the file that defines the name"
                assert LEVELS[other] < LEVELS[own], f"{own} (level {LEVELS[own]}) imports {other} ({LEVELS[other]})"
        if module.split(".")[0] == "transformers":
            assert own not in WITHOUT_TRANSFORMERS


def test_no_imports_form_a_circle():
    """Of any length, imports inside functions and for types included. The package itself imports lazily by name."""
    graph = networkx.DiGraph(
        (name_of(path), module)
        for path in MODULES
        for module, _ in imports_of(path)
        if module in NAMES and name_of(path) != "symphony_hf"
    )
    circles = [sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles
    assert not list(networkx.selfloop_edges(graph))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_have_their_rooms(path):
    for module, at_top in imports_of(path):
        rooms, lazy = ONLY_IN.get(module.split(".")[0], (None, False))
        if rooms is not None:
            assert room_of(name_of(path)) in rooms
            if not str(path.relative_to(ROOT)).startswith(OWN_PROGRAMS):
                assert not (lazy and at_top), f"{module} is imported at the top of {path.name}"


def documentation(path):
    """The docstring of each module, class and function, and each string that documents an attribute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_have_a_size(path):
    """At most 300 lines, and at least 40: a smaller file says why it stands alone."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 300
    if lines < 40 and path.stem not in ("__init__", "__main__"):
        assert "stands alone" in next(documentation(path), ""), "merge it, or say in its docstring why it stands alone"


def test_packages_have_at_least_three_files():
    packages = {path.parent for path in MODULES if path.parent.parent != ROOT.parent}
    files = {
        package: [*package.glob("*.py"), *(p for p in package.iterdir() if (p / "__init__.py").exists())]
        for package in packages
    }
    assert [str(package) for package, found in files.items() if len(found) < 4] == []  # and __init__.py


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_begin_with_what_a_thing_is_or_does(path):
    odd = [
        text
        for text in documentation(path)
        if text.split(maxsplit=1)[:1] and text.split()[0] in ("Of", "Whose", "What", "Which")
    ]
    assert not odd


@pytest.mark.thorough
def test_importing_the_package_stays_light(plain_python):
    """It imports no heavy library that `transformers.modeling_utils` does not import by itself."""
    script = (
        "import sys, transformers.modeling_utils; before = set(sys.modules); "
        "assert 'symphony_hf' not in before; import symphony_hf; "
        "heavy = ('matplotlib', 'peft', 'datasets', 'deepspeed', 'bitsandbytes', 'scipy.stats'); "
        "print([module for module in heavy if module in set(sys.modules) - before])"
    )
    assert ast.literal_eval(plain_python(script)) == []


def test_public_names_are_there_and_sorted():
    assert symphony_hf.__all__ == sorted(symphony_hf.__all__)
    for name in symphony_hf.__all__:
        assert getattr(symphony_hf, name) is not None
    assert set(symphony_hf.__all__) <= set(dir(symphony_hf))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = symphony_hf.nonsense
