"""Numbers and names on the pages are those of the result files and of the code."""

import dataclasses
import inspect
import json
import re
import statistics
import subprocess
from collections.abc import Iterator

import pytest
from compression_tables import compression_table, sweep_table
from compression_tables import findings as compared
from pages import FAMILIES, README, ROOT, block, items, links_of, named_code, table

import symphony_hf
from symphony_hf import SymphonyConfig
from symphony_hf.checkpoints.model_card import EFFECT
from symphony_hf.evaluation.report.quickstart import findings, result_table
from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.experiments.balancing.study import BIAS_FAMILIES, balance_table
from symphony_hf.experiments.bench.commit import PROCESSES, SIZES, commit_table
from symphony_hf.experiments.bench.evaluation import evaluation_table
from symphony_hf.experiments.bench.experts import experts_table
from symphony_hf.experiments.bench.layer_forms import BARE_LAYERS, SHAPES
from symphony_hf.experiments.bench.layer_rows import AIMS, bench_tables
from symphony_hf.tables import Table, cell_text

RECIPES = ROOT / "recipes"
QUICKSTART = RECIPES / "quickstart"
CONVERSION = ROOT / "symphony_hf" / "conversion" / "README.md"
GRAPH, DENSE = "smoe, graph", "smoe, no graph, router_gradient dense"
BENCHES = ("bench", "bench_deepseek_v3_router", "bench_deepseek_v3_router_1024", "bench_mixtral_8x7b")
EXPERIMENTS = ROOT / "symphony_hf" / "experiments" / "README.md"
PATCHING = ROOT / "symphony_hf" / "patching" / "README.md"


def result_of(recipe, name):
    return json.loads((RECIPES / recipe / f"{name}.json").read_text(encoding="utf-8"))


def benches():
    """The result of `symphony bench` of all models, of several runs."""
    first, *others = (result_of("quickstart", name) for name in BENCHES)
    for other in others:
        for key in ("aims", "bare_layers", "dtype", "threads", "device", "versions"):
            assert other[key] == first[key]
        first = first | {key: first[key] + other[key] for key in ("rows", "memory")}
    return first


def cells_of(made):
    """The texts of a table's cells, header first."""
    rows = [made.header, *made.rows] if isinstance(made, Table) else made
    return [[cell_text(cell) for cell in row] for row in rows]


# Tables.


def test_the_quickstart_table_is_the_result_file():
    report = result_of("quickstart", "report")
    assert table(QUICKSTART / "README.md", "quickstart table") == cells_of(result_table(report))
    assert items(QUICKSTART / "README.md", "quickstart table") == findings(report)
    assert report["command"] == "symphony quickstart"


def test_the_bench_tables_are_the_result_file():
    result = benches()
    names = ("added table", "whole table", "generation table")
    for name, expected in zip(names, bench_tables(result), strict=True):
        assert table(EXPERIMENTS, name) == cells_of(expected)
    measured = {name: [] for name in SHAPES}
    for row in result["rows"]:
        if row["mode"] == "training":
            measured[row["model"]].append(row["tokens"])
    assert measured == {name: [1, 4, 16, 64, 256, *([1024] if name != "mixtral-8x7b" else [])] for name in SHAPES}
    assert (result["aims"], result["bare_layers"]) == (AIMS, BARE_LAYERS)
    assert f"measured on {BARE_LAYERS} layers without attention" in " ".join(EXPERIMENTS.read_text("utf-8").split())
    memory = max(row["ratio"] for row in result["memory"])
    assert f"Peak memory is at most {memory:.4f} times stock's" in EXPERIMENTS.read_text(encoding="utf-8")


def test_the_table_of_evaluation_is_the_result_file():
    result = result_of("quickstart", "bench_evaluation")
    assert table(EXPERIMENTS, "evaluation table") == cells_of(evaluation_table(result))
    settings = [f"{result['model']} --documents {result['documents']}", f"--rounds {result['rounds']}", "--threads 1"]
    assert f"symphony bench-evaluation {' '.join(settings)}\n" in EXPERIMENTS.read_text(encoding="utf-8")
    assert result["threads"] == 1


def test_the_tables_of_balancing_are_the_result_file():
    result = result_of("evidence", "balance")
    assert table(EXPERIMENTS, "scopes table") == cells_of(balance_table(result, ("olmoe",), ""))
    assert table(EXPERIMENTS, "bias table") == cells_of(balance_table(result, BIAS_FAMILIES, ""))
    assert [result[name] for name in ("seeds", "steps")] == [3, 200]


def test_the_commit_table_is_the_result_file():
    result = result_of("quickstart", "bench_commit")
    assert table(EXPERIMENTS, "commit table") == cells_of(commit_table(result))
    assert table(EXPERIMENTS, "log table") == cells_of(commit_table(result, "log"))
    sizes = [(row["processes"], row["layers"], row["experts"]) for row in result["rows"] if row["work"] == "commit"]
    assert sizes == [(number, *size) for number in PROCESSES for size in SIZES]


def test_the_table_of_experts_is_the_result_file():
    page = RECIPES / "llava-smoe-4.2b" / "README.md"
    assert table(page, "experts") == cells_of(experts_table(result_of("llava-smoe-4.2b", "bench_experts")))


def test_the_tables_of_smaller_models_are_the_result_files():
    merged, pruned, swept = (result_of("quickstart", name)["runs"] for name in ("merge", "prune", "topk"))
    results = sorted(merged + pruned, key=lambda run: run["settings"]["model"])
    assert table(CONVERSION, "smaller models table") == cells_of(compression_table(results))
    assert items(CONVERSION, "smaller models table") == list(compared(results))
    assert table(CONVERSION, "top-k table") == cells_of(sweep_table(swept))
    for run in (*results, *swept):
        assert run["command"].startswith(f"symphony {run['command'].split()[1]} symphony-quickstart/")
        assert run["settings"]["seed"] == 0


@pytest.mark.parametrize("recipe", ["phi3-smoe-7.4b-glue", "llava-smoe-4.2b"])
def test_the_figures_of_full_size_are_the_result_files(recipe):
    result = result_of(recipe, "full_size")
    assert result["difference"] == 0
    assert result["shrink"] == 1
    rows = [["stage", "seconds", "largest memory"]]
    for seen in result["stages"]:
        steps = ", ".join(f"{step['step']} {step['seconds']:.1f}" for step in seen["steps"])
        rows.append([seen["stage"], steps, gigabytes(seen["peak_memory_bytes"])])
    assert table(RECIPES / recipe / "README.md", "full size") == rows


# Figures in sentences.


def gigabytes(size):
    return f"{size / 1e9:.2f} GB"


def figures(name):
    return block(CONVERSION, f"{name} figures").replace("\n", " ")


def test_the_figures_of_upcycling_are_the_result_file():
    result = result_of("phi3-smoe-7.4b-glue", "upcycle")
    assert result["shapes"] == "Phi-3-mini"
    names = ("dense_bytes", "bytes", "bytes", "peak_memory_bytes", "peak_memory_bytes_with_check")
    wanted = [gigabytes(result[name]) for name in names]
    wanted += [f"{statistics.median(result[name]):.0f} seconds" for name in ("seconds", "seconds_of_a_copy")]
    for name in ("ratio", "noise"):
        median, low, high = (f"{result[name][part]:.2f}" for part in ("median", "low", "high"))
        assert re.search(rf"{median} \((?:quartiles )?{low} to {high}\)", figures("upcycle"))
    assert sorted(re.findall(r"\d[\d.]* (?:GB|seconds)", figures("upcycle"))) == sorted(wanted)
    assert result["check"]["difference"] <= 1e-5 * result["check"]["largest"]


def test_the_figures_of_4_bits_are_the_result_files():
    sizes = [result_of(recipe, "bytes_4bit")["bytes"] for recipe in ("olmoe-7b-sft", "mixtral-8x7b-qlora")]
    wanted = [gigabytes(size[form]) for size in sizes for form in ("bfloat16", "experts in 4 bits")]
    wanted += [gigabytes(size["experts and linear maps in 4 bits"]) for size in sizes]
    assert re.findall(r"\d[\d.]* GB", figures("4-bit")) == wanted


# The README.


def test_the_findings_are_those_of_the_result_files():
    routing, gradient, tuning, contaminated, quality, forms, compression, cost = items(README, "findings")

    study = result_of("evidence", "characters-tuned")
    graph, dense = (
        next(row["against_plain"] for row in study["rows"] if row["label"] == label) for label in (GRAPH, DENSE)
    )
    chosen = {row["chosen"] for row in study["tuning"]}
    assert chosen == {max(study["settings"]["learning_rates"])}
    assert f"{study['settings']['tokens'] / 1e6:.0f}M characters, eight seeds each" in routing
    assert (graph["clean_nats"]["num_seeds"], len(study["settings"]["tuning_seeds"])) == (8, 4)
    assert f"({interval_text(graph['clean_nats'], 4, sign='+').replace(' [', ' nats a character [')};" in " ".join(
        routing.split()
    )
    other = result_of("evidence", "characters-pretraining-forms")
    (again,) = (row["against_plain"] for row in other["rows"] if row["label"] == GRAPH)
    kept = [f"{100 * values['routing_kept_0.15']['estimate']:.1f}" for values in (graph, again)]
    assert f"{' and '.join(kept)} points more" in " ".join(routing.split())
    for name, verdict in (("clean_nats", "worse"), ("damaged_nats_0.15", "better")):
        assert (again[name]["verdict"], again[name]["num_seeds"]) == (verdict, 8)
        assert f"({interval_text(again[name], 4, sign='+')})" in " ".join(routing.split())
    assert other["sight"]["measures"]["damaged_nats_0.15"]["frozen_routers"]["high"] < 0
    assert (other["settings"]["tokens"], other["settings"]["learning_rates"]) == (study["settings"]["tokens"], [])
    assert f"a true difference of {graph['clean_nats']['smallest']:.4f} would" in " ".join(routing.split())
    verdicts = [graph[name]["verdict"] for name in ("clean_nats", "damaged_nats_0.15", "routing_kept_0.15")]
    assert verdicts == ["not distinguishable", "not distinguishable", "better"]
    assert dense["clean_nats"]["verdict"] == "not distinguishable"
    assert f"({interval_text(dense['clean_nats'], 4, sign='+')})" in gradient
    seconds = [
        statistics.median(
            cell["train_cpu_seconds"] for cell in study["cells"] if (cell["label"], cell["stage"]) == (label, "judge")
        )
        for label in (DENSE, "smoe, no graph")
    ]
    assert f"for {seconds[0] / seconds[1]:.1f} times the CPU time" in gradient

    study = result_of("evidence", "characters-short")
    (dense,) = (row["against_plain"] for row in study["rows"] if row["label"] == DENSE)
    assert f"{study['settings']['tokens'] / 1e6:.0f}M characters, three seeds" in gradient
    assert (dense["clean_nats"]["num_seeds"], dense["clean_nats"]["verdict"]) == (3, "better")
    assert f"({interval_text(dense['clean_nats'], 4, sign='+')})" in gradient

    names = ("forms", "short", "combinations")
    studies = [result_of("evidence", f"characters-fine-tuning-{name}") for name in names]
    settings, text = studies[0]["settings"], " ".join(tuning.split())
    tokens = settings["tokens"], settings["tokens"] / settings["steps"] * settings["pretraining_steps"]
    first, then = (f"{number / 1e6:.1f}M" for number in tokens)
    assert f"{first} characters after {then} of another text, three studies of eight seeds each" in text
    of_graph = [next(row["against_plain"] for row in study["rows"] if row["label"] == GRAPH) for study in studies]
    for name, verdicts in (
        ("clean_nats", ["worse"] * 3),
        ("damaged_nats_0.15", ["not distinguishable", "better", "better"]),
    ):
        assert [(graph[name]["num_seeds"], graph[name]["verdict"]) for graph in of_graph] == [(8, v) for v in verdicts]
    assert f"({', '.join(interval_text(graph['damaged_nats_0.15'], 4, sign='+') for graph in of_graph)})" in text
    clean, forgotten, kept = (
        sorted(graph[name]["estimate"] for graph in of_graph)
        for name in ("clean_nats", "forgotten_nats", "routing_kept_0.15")
    )
    for values in (clean, forgotten):
        assert f"({values[0]:+.4f} to {values[-1]:+.4f})" in text
    assert f"{100 * kept[0]:.1f} to {100 * kept[-1]:.1f} points more" in text
    assert {graph["forgotten_nats"]["verdict"] for graph in of_graph} == {"worse"}
    assert {graph["load_entropy"]["verdict"] for graph in of_graph} == {"lower"}
    frozen = [study["sight"]["measures"]["damaged_nats_0.15"]["frozen_routers"] for study in studies]
    assert max(values["high"] for values in frozen) < 0
    shown = sorted(values["estimate"] for values in frozen)
    assert f"({shown[-1]:+.4f} to {shown[0]:+.4f})" in text
    evidence = (RECIPES / "EVIDENCE.md").read_text(encoding="utf-8")
    no_winner = "defaults**: no form is better on one of the texts and worse on none"
    assert (
        sum(no_winner in line for line in evidence.splitlines() if line.startswith("- **Characters, fine-tuning")) == 5
    )
    (damage,) = (row["against_plain"] for row in studies[0]["rows"] if row["label"] == "smoe, no graph, damage 0.05")
    for name, verdict in (("damaged_nats_0.15", "better"), ("clean_nats", "worse")):
        assert damage[name]["verdict"] == verdict
        assert interval_text(damage[name], 4, sign="+") in text

    text = " ".join(contaminated.split())
    for name, labels in (
        ("contamination-short", (GRAPH, "smoe, normalization centred")),
        ("pretraining-contamination-short", (GRAPH,)),
    ):
        study = result_of("evidence", f"characters-{name}")
        assert (study["settings"]["contamination"], len(study["settings"]["learning_rates"])) == (0.05, 2)
        of_form = {row["label"]: row["against_plain"] for row in study["rows"] if "against_plain" in row}
        for label in labels:
            for measure in ("clean_nats", "damaged_nats_0.15"):
                values = of_form[label][measure]
                assert (values["num_seeds"], values["verdict"]) == (8, "worse")
                assert interval_text(values, 4, sign="+") in text
        assert study["sight"]["measures"]["damaged_nats_0.15"]["frozen_routers"]["low"] > 0

    pairs = result_of("evidence", "pairs")
    of_graph = {row["label"]: row["against_plain"] for row in pairs["rows"] if "against_plain" in row}
    smoe = of_graph["smoe, graph"]["clean"]
    assert f"{pairs['cells'][0]['tokens'] / 1e6:.0f}M words, three seeds" in quality
    assert f"SMoE's clean perplexity {smoe['estimate'] - 1:.1%} {smoe['verdict']}" in quality
    others = [of_graph[f"{system}, graph"]["clean"]["verdict"] for system in ("xmoe", "glam")]
    assert others == ["not distinguishable"] * 2
    assert [against["routing_kept"]["verdict"] for against in of_graph.values()] == ["better"] * 3
    assert smoe["num_seeds"] == 3

    axes = result_of("evidence", "ablation")
    of_form = {row["label"]: row for row in axes["rows"] if "against_plain" in row}
    control = of_form.pop("smoe, graph")["against_shuffled"]
    assert f"{axes['cells'][0]['tokens'] / 1e6:.1f}M words, three seeds" in forms
    assert f"none of {len(of_form)} other forms" in forms
    assert "better" not in {row["against_plain"]["clean"]["verdict"] for row in of_form.values()}
    assert {control[name]["verdict"] for name in ("clean", "routing_kept")} == {"not distinguishable"}

    runs = {
        tuple(run["settings"][name].removeprefix("symphony-quickstart/") for name in ("model", "by", "graph")): run
        for run in result_of("quickstart", "merge")["runs"]
    }
    keys = [
        *(("symphony", by, "learned") for by in ("graph", "outputs")),
        *(("plain", "graph", "counted"), ("plain", "outputs", "learned")),
    ]
    losses = [runs[key]["perplexity"]["ratio"]["estimate"] - 1 for key in keys]
    assert re.findall(r"\d+%", compression) == [f"{loss:.0%}" for loss in losses]
    assert "centrality in the graph loses less than by load or by REAP" in " ".join(compression.split())
    pruned = [run for run in result_of("quickstart", "prune")["runs"] if run["settings"]["model"].endswith("symphony")]
    ratio_of = {
        (run["settings"]["by"], run["settings"]["graph"]): run["perplexity"]["ratio"]["estimate"] for run in pruned
    }
    assert min(ratio_of, key=ratio_of.get) == ("centrality", "learned")

    bench = benches()

    def most(mode, lengths):
        return max(row["ratio"] for row in bench["rows"] if row["mode"] == mode and row["tokens"] in lengths) - 1

    batches = (4, 16, 64, 256, 1024)
    added = [most("training, added", batches), most("inference, added", batches), most("inference, added", (1,))]
    assert re.findall(r"[\d.]+%", cost) == [f"{share:.2%}" for share in added]
    assert f"{max(row['ratio'] for row in bench['memory']):.4f} times" in cost


def test_the_effect_on_the_first_screen_and_on_cards_is_that_of_the_result_file():
    study = result_of("evidence", "characters-fine-tuning-forms")
    (graph,) = (row["against_plain"] for row in study["rows"] if row["label"] == GRAPH)
    clean, kept, forgotten, damaged = (
        graph[name] for name in ("clean_nats", "routing_kept_0.15", "forgotten_nats", "damaged_nats_0.15")
    )
    low, high = (f"{clean[end]:.4f}" for end in ("low", "high"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    for effect in (EFFECT, text[text.index("What to expect") : text.index("## Try it")]):
        assert f"raises the loss on clean text by {clean['estimate']:.4f} nats a character [{low}, {high}]" in effect
        assert f"{100 * kept['estimate']:.1f} points more" in effect
        assert f"text of the pre-training by {interval_text(forgotten, 4)}" in effect
        assert "the loss is not distinguishable" in effect
        assert study["command"].split(" --output")[0] in effect
    verdicts = [values["verdict"] for values in (clean, forgotten, kept, damaged)]
    assert (*verdicts, clean["num_seeds"]) == ("worse", "worse", "better", "not distinguishable", 8)
    assert f"({interval_text(damaged, 4, sign='+')})" in EFFECT
    assert max(cell["parameters"] for cell in study["cells"]) == pytest.approx(1.1e6, rel=0.05)


def test_the_quickstarts_result_in_the_readme_is_the_result_file():
    clean, attacked, *_ = findings(result_of("quickstart", "report"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    ending = re.compile(r"([\d.]+%) \[.*\]: (\w+)\.")
    for sentence, name in ((clean, "clean"), (attacked, "attacked")):
        change, verdict = ending.search(sentence).groups()
        assert f"{name} perplexity {change} {verdict}" in text
    page = " ".join((QUICKSTART / "README.md").read_text(encoding="utf-8").split())
    one_thread, elsewhere = (
        [ending.search(sentence).groups() for sentence in findings(result_of("quickstart", f"report_{name}"))[:2]]
        for name in ("one_thread", "another_machine")
    )
    assert [verdict for _, verdict in one_thread] == ["worse", "worse"]
    clean, attacked = (change for change, _ in one_thread)
    assert f"clean perplexity is {clean} worse with the graph and attacked perplexity {attacked} worse" in page
    again = " and ".join(f"{change} {verdict}" for change, verdict in elsewhere)
    for shown in (text, page):
        assert again in shown


def test_the_test_command_is_the_one_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"test_command\(\).*?\n}", script, re.S).group(0)
    result = subprocess.run(
        ["bash", "-c", f"{function}\ntest_command"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert result.stdout == named_code(README, "test command") == 'pip install -e ".[test]" && pytest -n auto\n'


def test_the_settings_table_has_every_setting_and_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", README.read_text(encoding="utf-8"), re.M)
    table_ = dict(rows[rows.index(("SymphonyConfig", "default")) + 1 :])
    defaults = {field.name: field.default for field in dataclasses.fields(SymphonyConfig)}
    assert table_.keys() == defaults.keys()
    for name, default in defaults.items():
        unset = {"layers": "all", "routers": "detected", "top_k": "detected"}
        expected = "true" if default is True else unset[name] if default is None else str(default)
        assert table_[name].strip("`") == expected, name


def test_every_public_name_is_in_its_table():
    (section,) = PATCHING.read_text(encoding="utf-8").split("## Public names")[1:]
    names = re.findall(r"`(\w+)`", "".join(line for line in section.splitlines() if line.startswith("|")))
    assert sorted(names) == sorted(set(symphony_hf.__all__) - {"__version__"})


FUNCTIONS = [name for name in symphony_hf.__all__ if inspect.isfunction(getattr(symphony_hf, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_what_they_take_and_return(name):
    function = getattr(symphony_hf, name)
    text = inspect.getdoc(function)
    _, _, arguments = text.partition("Args:\n")
    described = re.findall(r"^    \**(\w+): ", arguments.split("\n\n")[0], re.M)
    signature = inspect.signature(function)
    assert described == list(signature.parameters)
    if signature.return_annotation not in (None, Iterator[None]):
        assert text.startswith("Return ") or re.search("^(Returns|Yields):$", text, re.M)


def test_every_extra_is_in_its_table():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = ", section, re.M)
    assert re.findall(r"^\| `(\w+)` \|", (RECIPES / "README.md").read_text(encoding="utf-8"), re.M)[-9:] == extras


def test_every_recipe_is_in_the_table():
    for page in RECIPES.glob("*/README.md"):
        assert str(page.relative_to(ROOT)) in links_of(README), page


def test_the_numbers_of_families_are_those_of_the_table():
    sentence = block(FAMILIES, "families table").split("\n", 1)[0]
    counts = re.search(r"(\d+) model types .*, (\d+) checked .*, (\d+) refused, (\d+) not built", sentence).groups()
    total, checked, refused, missing = counts
    expected = f"{total} model types of Transformers: {checked} checked, {refused} refused, {missing} not built"
    assert expected in README.read_text(encoding="utf-8")


def test_the_first_example_has_as_many_lines_of_the_package_as_the_readme_says():
    lines = [line for line in named_code(README, "first example").splitlines() if "symphony_hf" in line]
    number = ("One", "Two", "Three", "Four", "Five")[len(lines) - 1]
    assert f"{number} lines are specific to symphony_hf" in README.read_text(encoding="utf-8")


def test_the_example_of_a_router_gradient_runs():
    names = {}
    page = ROOT / "symphony_hf" / "patching" / "README.md"
    exec(compile(named_code(page, "gradient example"), "README.md", "exec"), names)
    router = names["model"].model.layers[0].mlp.gate
    assert int(router.symphony.updates) == 3
    assert router.gradient_of_others is not None


def test_the_example_of_a_custom_gate_runs(capsys):
    names = {}
    exec(
        compile(named_code(ROOT / "symphony_hf" / "patching" / "README.md", "gates example"), "README.md", "exec"),
        names,
    )
    graph = names["expert_graphs"](names["model"])["0.switchboard"]
    assert graph.shape == (4, 4)
    assert (graph - graph.diag().diag()).sum() > 0
    assert "tensor(" in capsys.readouterr().out
