"""The notebooks: kept without outputs, and run from the first cell to the last as their reader's kernel would."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TITLES = ["symphonize_a_model", "read_the_expert_graph", "train_and_compare", "robustness", "share_and_serve"]
LIMIT = 1200
"""Seconds. Each takes under three minutes by itself on two cores; others may be at work beside it."""


def cells_of(notebook, kind):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def code_of(cell):
    """Without the shell's lines, which are not Python."""
    return "".join(line for line in cell["source"] if not line.startswith("!"))


def test_they_are_all_there_by_number():
    assert [path.stem for path in NOTEBOOKS] == [f"{number:02}_{title}" for number, title in enumerate(TITLES, 1)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_kept_without_outputs(notebook):
    for cell in cells_of(notebook, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_show_the_library_and_have_no_logic_of_their_own(notebook):
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try, ast.Lambda)
    code = [code_of(cell) for cell in cells_of(notebook, "code")]
    found = [type(node).__name__ for cell in code for node in ast.walk(ast.parse(cell)) if isinstance(node, logic)]
    assert found == []
    assert any("symphony_hf" in cell for cell in code)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(notebook, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # which they name from where they are
    copy = shutil.copy(notebook, tmp_path / "notebooks")
    command = [sys.executable, "-m", "jupyter", "execute", str(copy), "--inplace"]
    run = subprocess.run(command, cwd=tmp_path / "notebooks", capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stderr[-4000:]
    # An expression that a cell ends in, such as a comparison of logits, is what the text promises.
    results = [
        "".join(output["data"].get("text/plain", ""))
        for cell in cells_of(Path(copy), "code")
        for output in cell["outputs"]
        if output["output_type"] == "execute_result"
    ]
    assert results
    assert "False" not in "".join(results if notebook.stem[:2] in ("01", "05") else [])
