"""The README says what the files and the code say."""

import ast
import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
from readme import block

from symphony_hf import SymphonyConfig, __all__
from symphony_hf.conversion.compression.tables import compression_table, sweep_table
from symphony_hf.conversion.compression.tables import findings as compared
from symphony_hf.evaluation.report.quickstart import findings, result_table
from symphony_hf.experiments.bench.commit import PROCESSES, SIZES, commit_table
from symphony_hf.experiments.bench.experts import experts_table
from symphony_hf.experiments.bench.layer import AIMS, bench_table
from symphony_hf.tables import cell_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "recipes" / "quickstart"


def as_markdown(rows):
    header, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *rest]) + "\n"


def cells_of(table):
    return [table.header, *([cell_text(cell) for cell in row] for row in table.rows)]


def test_the_quickstart_table_is_the_result_file():
    report = json.loads((RESULTS / "report.json").read_text())
    findings_ = "".join(f"- {sentence}\n" for sentence in findings(report))
    assert block("quickstart table") == f"{as_markdown(result_table(report))}\n{findings_}"
    assert report["command"] == "symphony quickstart"


def test_the_bench_table_is_the_result_file():
    result = json.loads((RESULTS / "bench.json").read_text())
    assert block("bench table") == as_markdown(cells_of(bench_table(result)))
    assert {row["model"] for row in result["rows"]} == {"mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"}
    assert result["aims"] == AIMS


def test_the_commit_table_is_the_result_file():
    result = json.loads((RESULTS / "bench_commit.json").read_text())
    assert block("commit table") == as_markdown(cells_of(commit_table(result)))
    assert block("log table") == as_markdown(cells_of(commit_table(result, "log")))
    sizes = [(row["processes"], row["layers"], row["experts"]) for row in result["rows"] if row["work"] == "commit"]
    assert sizes == [(number, *size) for number in PROCESSES for size in SIZES]


def test_the_table_of_experts_is_the_result_file():
    folder = ROOT / "recipes" / "llava-smoe-4.2b"
    result = json.loads((folder / "bench_experts.json").read_text())
    table = re.search(r"<!-- experts -->\n(.*?)<!-- end -->", (folder / "README.md").read_text(), re.S)
    assert table.group(1) == as_markdown(cells_of(experts_table(result)))


def smaller_models(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["runs"]


def test_the_tables_of_smaller_models_are_the_result_files():
    results = sorted(smaller_models("merge") + smaller_models("prune"), key=lambda run: run["settings"]["model"])
    sentences = "".join(f"- {sentence}\n" for sentence in compared(results))
    assert block("smaller models table") == f"{as_markdown(compression_table(results))}\n{sentences}"
    assert block("top-k table") == as_markdown(sweep_table(smaller_models("topk")))
    for run in (*results, *smaller_models("topk")):
        assert run["command"].startswith(f"symphony {run['command'].split()[1]} symphony-quickstart/")
        assert run["settings"]["seed"] == 0


def test_the_test_command_is_the_one_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"test_command\(\).*?\n}", script, re.S).group(0)
    result = subprocess.run(
        ["bash", "-c", f"{function}\ntest_command"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert result.stdout == 'pip install -e ".[test]" && pytest -n auto\n'


def test_the_settings_table_has_every_setting_and_its_default():
    table = re.search(r"^\| `SymphonyConfig` \| default \|.*?\n\n", README, re.M | re.S).group(0)
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.M))
    assert rows.pop("SymphonyConfig") == "default"
    defaults = {field.name: field.default for field in dataclasses.fields(SymphonyConfig)}
    assert rows.keys() == defaults.keys()
    for name, default in defaults.items():
        unset = {"layers": "all", "routers": "found", "top_k": "seen"}
        expected = "true" if default is True else unset[name] if default is None else str(default)
        assert rows[name].strip("`") == expected, name


def test_the_python_in_it_parses_and_names_what_exists():
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        nodes = list(ast.walk(ast.parse(code)))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert {name for name in used if name.startswith("Auto")} <= {alias.name for i in imports for alias in i.names}
    for name in re.findall(r"symphony_hf\.(\w+)\(", README):
        assert name in __all__
    for path in re.findall(r"\((recipes/[\w/.]+)\)", README):
        assert (ROOT / path).exists()


def test_the_example_of_a_gate_of_ones_own_runs(capsys):
    code = re.search(r"<!-- gates example -->\n```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    graph = names["expert_graphs"](names["model"])["0.switchboard"]
    assert graph.shape == (4, 4)
    assert (graph - graph.diag().diag()).sum() > 0
    assert "tensor(" in capsys.readouterr().out


def figures(name):
    return re.search(rf"<!-- {name} figures -->(.*?)<!-- end -->", README, re.S).group(1).replace("\n", " ")


def gigabytes(size):
    return f"{size / 1e9:.2f} GB"


def test_the_figures_of_upcycling_are_the_result_file():
    result = json.loads((ROOT / "recipes" / "phi3-smoe-7.4b-glue" / "upcycle.json").read_text())
    assert result["shapes"] == "Phi-3-mini"
    names = ("dense_bytes", "bytes", "bytes", "peak_memory_bytes", "peak_memory_bytes_with_check")
    wanted = [gigabytes(result[name]) for name in names]
    wanted += [f"{sum(result[name]) / 2:.0f} seconds" for name in ("seconds", "seconds_of_a_copy")]
    assert sorted(re.findall(r"\d[\d.]* (?:GB|seconds)", figures("upcycle"))) == sorted(wanted)
    assert result["check"]["difference"] <= 1e-5 * result["check"]["largest"]


def test_the_figures_of_4_bits_are_the_result_files():
    wanted = []
    for recipe in ("olmoe-7b-sft", "mixtral-8x7b-qlora"):
        sizes = json.loads((ROOT / "recipes" / recipe / "bytes_4bit.json").read_text())["bytes"]
        wanted += [gigabytes(sizes["bfloat16"]), gigabytes(sizes["experts and linear maps in 4 bits"])]
    assert re.findall(r"\d[\d.]* GB", figures("4-bit")) == wanted


def test_every_recipe_is_named():
    for folder in (ROOT / "recipes").glob("*/README.md"):
        assert f"(recipes/{folder.parent.name}/README.md)" in README, folder


@pytest.mark.parametrize("recipe", ["phi3-smoe-7.4b-glue", "llava-smoe-4.2b"])
def test_the_figures_of_full_size_are_the_result_files(recipe):
    result = json.loads((ROOT / "recipes" / recipe / "full_size.json").read_text())
    assert result["difference"] == 0
    assert result["shrink"] == 1
    rows = [["stage", "seconds", "largest memory"]]
    for seen in result["stages"]:
        steps = ", ".join(f"{step['step']} {step['seconds']:.1f}" for step in seen["steps"])
        rows.append([seen["stage"], steps, gigabytes(seen["peak_memory_bytes"])])
    page = (ROOT / "recipes" / recipe / "README.md").read_text()
    assert re.search(r"<!-- full size -->\n(.*?)<!-- end -->", page, re.S).group(1) == as_markdown(rows)
