"""The notebooks: stored without outputs, and run from the first cell to the last in a kernel."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import symphony_hf

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TITLES = ["symphonize_a_model", "read_the_expert_graph", "train_and_compare", "robustness", "share_and_serve"]
LIMIT = 1200
"""Seconds. Each takes under three minutes on two idle cores."""

COMPARISONS = {"01_symphonize_a_model": 2, "05_share_and_serve": 1}
"""Number of cells whose result is a comparison that holds."""

PRINTED = {
    "05_share_and_serve": r"symphony_hf is loaded: False\nlargest difference of the logits: (0|\de-0[6-9])\n",
}
"""What other processes print."""


def cells_of(notebook, kind):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def outputs_of(notebook, kind, mime_type="text/plain"):
    """The texts of one kind of output, such as cells' results or what they print."""
    outputs = [output for cell in cells_of(notebook, "code") for output in cell["outputs"]]
    return [
        "".join(output["text"] if kind == "stream" else output["data"].get(mime_type, ""))
        for output in outputs
        if output["output_type"] == kind and output.get("name") != "stderr"
    ]


def test_all_notebooks_are_there_in_order():
    assert [path.stem for path in NOTEBOOKS] == [f"{number:02}_{title}" for number, title in enumerate(TITLES, 1)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(notebook):
    for cell in cells_of(notebook, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_logic_of_their_own(notebook):
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try, ast.Lambda)
    code = ["".join(cell["source"]) for cell in cells_of(notebook, "code")]
    found = [type(node).__name__ for cell in code for node in ast.walk(ast.parse(cell)) if isinstance(node, logic)]
    assert found == []
    assert any("symphony_hf" in cell for cell in code)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_of_notebooks_exist(notebook):
    """In the default run, since notebooks name files of the package and run only in the slow one."""
    nodes = [node for cell in cells_of(notebook, "code") for node in ast.walk(ast.parse("".join(cell["source"])))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("symphony_hf")]
    for node in imports:
        module = importlib.import_module(node.module)
        for alias in node.names:
            assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
    used = [
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "symphony_hf"
    ]
    assert set(used) <= set(symphony_hf.__all__)
    assert imports or used


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # notebooks name recipes relative to their own folder
    copy = Path(shutil.copy(notebook, tmp_path / "notebooks"))
    command = [sys.executable, "-m", "jupyter", "execute", str(copy), "--inplace"]
    run = subprocess.run(command, cwd=tmp_path / "notebooks", capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stderr[-4000:]
    assert outputs_of(copy, "execute_result").count("True") == COMPARISONS.get(notebook.stem, 0)
    assert re.search(PRINTED.get(notebook.stem, ""), "".join(outputs_of(copy, "stream")))
    for text in outputs_of(copy, "execute_result", "text/markdown"):
        assert not text.startswith("---")
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (copy.parent / picture).exists(), picture
