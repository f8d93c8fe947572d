"""The doors of the house: a module imports only from lower levels, and heavy libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import symphony_hf

ROOT = Path(symphony_hf.__file__).parent
LEVELS = {
    "_version": 0,
    "errors": 0,
    "config": 0,
    "unfinished": 0,
    "json_objects": 0,
    "parsing": 0,
    "recipe": 0,
    "routing": 1,
    "graph": 2,
    "graph_files": 2,
    "guards": 2,
    "stack": 2,
    "tracking": 2,
    "compat": 3,
    "families": 3,
    "router": 4,
    "self_check": 4,
    "attachment": 4,
    "publishing": 4,
    "saving": 4,
    "modules": 4,
    "patching": 4,
    "watching": 4,
    "folding": 4,
    "anatomy": 5,
    "adapters": 5,
    "quantization": 5,
    "hub": 5,
    "sharing": 5,
    "data": 5,
    "evaluation": 5,
    "attacks": 5,
    "robustness": 6,
    "observation": 6,
    "compression": 6,
    "upcycling": 5,
    "diagnostics": 4,
    "training": 6,
    "planning": 6,
    "conformance": 6,
    "loading": 5,
    "fuzzing": 6,
    "ablation": 6,
    "theory": 6,
    "evidence": 7,
    "quickstart": 7,
    "report": 7,
    "reporting": 7,
    "bench": 7,
    "bench_commit": 7,
    "bench_experts": 7,
    "bench_upcycle": 7,
    "full_size": 7,
    "train": 7,
    "cli": 7,
}
ONLY_IN = {  # what may import it; `lazy`: inside functions alone
    "matplotlib": ({"diagnostics"}, False),
    "peft": ({"training", "hub", "adapters"}, True),
    "deepspeed": ({"training", "hub"}, True),
    "accelerate": ({"training", "hub"}, True),
    "bitsandbytes": ({"training", "hub", "quantization"}, True),
}
MODULES = sorted(path for path in ROOT.rglob("*.py"))


def package_of(path):
    """The room that a file is in: the package or the module right below symphony_hf."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """(module, whether at the top of the file) of every import; relative ones made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set()
    for node in tree.body:
        top.update(id(inner) for inner in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module, id(node) in top
                continue
            parts = ["symphony_hf", *path.relative_to(ROOT).parts[:-1]]
            base = parts[: len(parts) - (node.level - 1)]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield ".".join([*base, name]), id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_doors_open_downwards(path):
    own = package_of(path)
    if own == "__init__":
        return
    assert own in LEVELS, f"{own} has no level: give it one"
    for module, _ in imports_of(path):
        if module.startswith("symphony_hf."):
            other = module.split(".")[1]
            assert other == own or LEVELS[other] <= LEVELS[own], f"{own} (level {LEVELS[own]}) imports {other}"
        if module.split(".")[0] == "transformers":
            assert LEVELS[own] >= 3, f"{own} (level {LEVELS[own]}) imports transformers"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_have_their_rooms(path):
    for module, at_top in imports_of(path):
        rooms, lazy = ONLY_IN.get(module.split(".")[0], (None, False))
        if rooms is not None:
            assert package_of(path) in rooms
            assert not (lazy and at_top), f"{module} is imported at the top of {path.name}"


def test_importing_the_package_stays_light():
    script = (
        "import sys, symphony_hf; "
        "heavy = ('matplotlib', 'peft', 'datasets', 'deepspeed', 'bitsandbytes', 'scipy.stats'); "
        "print([module for module in heavy if module in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(ast.literal_eval(result.stdout))
    alone = subprocess.run(
        [sys.executable, "-c", script.replace("symphony_hf", "transformers.modeling_utils")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert loaded <= set(ast.literal_eval(alone.stdout))


def test_public_names_are_there_and_sorted():
    assert symphony_hf.__all__ == sorted(symphony_hf.__all__)
    for name in symphony_hf.__all__:
        assert getattr(symphony_hf, name) is not None
    assert set(symphony_hf.__all__) <= set(dir(symphony_hf))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = symphony_hf.nonsense
