"""The benchmarks compare forms that compute the same, and report their measurements. No test asserts a time."""

import json

import pytest
import torch
from models import assert_folded

from symphony_hf import ConfigError, record_routing
from symphony_hf.experiments.bench import commit as bench_commit
from symphony_hf.experiments.bench import experts as bench_experts
from symphony_hf.experiments.bench import gradient, layer_forms
from symphony_hf.experiments.bench import layer as bench_module
from symphony_hf.experiments.bench import upcycle as bench_upcycle
from symphony_hf.experiments.bench.evaluation import run_bench_evaluation
from symphony_hf.experiments.bench.layer import run_bench
from symphony_hf.experiments.bench.layer_forms import SHAPES, build_forms
from symphony_hf.experiments.bench.layer_rows import AIMS, print_bench

TINY = {
    "tiny": {
        **SHAPES["olmoe-1b-7b"],
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
}

FORWARD = [
    *("training", "training, added", "watched", "inference", "inference, added"),
    *("folded", "noise", "training noise"),
]
TINY_EXPERTS = {"wide": (16, 24, 20, "gelu", 6), "square": (16, 24, 16, "quick_gelu", 7)}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for module in (bench_module, layer_forms):
        monkeypatch.setattr(module, "SHAPES", TINY)


@pytest.mark.parametrize("is_bare", [False, True])
def test_the_three_forms_share_experts_and_compute_the_same(is_bare):
    forms = build_forms("tiny", torch.device("cpu"), torch.float32, is_bare)
    inputs = torch.randn(1, 9, 32)
    stock, symphony, folded = (forms[name].eval()(inputs_embeds=inputs)[0] for name in ("stock", "symphony", "folded"))
    assert torch.equal(stock, folded)
    assert_folded(stock, symphony)
    routers = {name: model.model.layers[0].mlp.gate for name, model in forms.items()}
    assert not torch.equal(routers["symphony"].weight, routers["stock"].weight)
    attention = () if is_bare else ("model.layers.0.self_attn.q_proj.weight",)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", *attention):
        assert len({forms[form].get_parameter(name).data_ptr() for form in forms}) == 1


def test_training_steps_leave_the_routing_of_the_forms_the_same():
    """Otherwise the experts' work differs between them, and the ratio is not the cost of the graph."""
    forms = build_forms("tiny", torch.device("cpu"), torch.float32, is_bare=True)
    inputs = torch.randn(1, 64, 32)
    for _ in range(300):
        layer_forms.training_step(forms["symphony"], inputs)
    chosen = []
    for name in ("stock", "symphony"):
        with record_routing(forms[name].eval()) as choices, torch.no_grad():
            forms[name](inputs_embeds=inputs)
        chosen.append(choices.experts.sort(-1).values)
    assert torch.equal(*chosen)


def test_rows_and_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    result = run_bench(["tiny"], tokens=16, device="cpu", seconds=0.05, output=path)
    assert [row["mode"] for row in result["rows"]] == FORWARD
    for row in result["rows"]:
        assert row["rounds"] >= 5
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    print_bench(result)
    printed = capsys.readouterr().out
    assert str(path) in printed.replace("\n", "")
    assert {row["mode"] for row in result["rows"]} - AIMS.keys() == {"noise", "training noise"}


@pytest.mark.thorough
def test_several_lengths_generation_and_memory(tmp_path, capsys):
    threads = torch.get_num_threads()
    result = run_bench(
        ["tiny"], tokens=(1, 4), generate=True, threads=1, device="cpu", seconds=0.02, output=tmp_path / "b.json"
    )
    assert result["threads"] == 1
    assert torch.get_num_threads() == threads
    assert [(row["mode"], row["tokens"]) for row in result["rows"]] == [
        *((mode, tokens) for tokens in (1, 4) for mode in FORWARD),
        *((mode, batch) for batch in (1, 8) for mode in ("generate", "generate noise")),
    ]
    memory = [(row["step"], row["tokens"]) for row in result["memory"]]
    assert memory == [("training", 1), ("training", 4), ("generate", 1), ("generate", 8)]
    for row in result["memory"]:
        assert row["ratio"] == row["bytes"] / row["stock_bytes"] > 1  # a tiny layer's graph is no small part of it
    print_bench(result)
    assert "Peak memory over stock" in capsys.readouterr().out


@pytest.fixture
def little_memory(monkeypatch):
    """A machine on which no training step of more than 4 tokens fits."""
    step = layer_forms.training_step

    def with_little_memory(model, inputs):
        if inputs.shape[1] > 4:
            raise MemoryError
        step(model, inputs)

    monkeypatch.setattr(layer_forms, "training_step", with_little_memory)


@pytest.mark.thorough
@pytest.mark.usefixtures("little_memory")
def test_memory_is_measured_at_the_lengths_that_fit(tmp_path):
    path = tmp_path / "bench.json"
    result = run_bench(["tiny"], tokens=(16, 8), generate=True, device="cpu", seconds=0.02, output=path)
    assert {row["tokens"] for row in result["rows"] if row["mode"] in FORWARD} == {4}
    assert [row["tokens"] for row in result["memory"] if row["step"] == "training"] == [4]


@pytest.mark.thorough
@pytest.mark.usefixtures("little_memory")
def test_the_router_gradient_is_measured_at_the_lengths_that_fit(tmp_path):
    path = tmp_path / "bench.json"
    result = run_bench(["tiny"], tokens=(16, 8), router_gradient=True, device="cpu", seconds=0.02, output=path)
    assert [row["tokens"] for row in result["gradients"]] == [4] * 5


@pytest.mark.thorough
@pytest.mark.parametrize(("key", "builder"), [("rows", bench_module), ("gradients", gradient)], ids=["all", "gradient"])
def test_an_interrupted_bench_keeps_the_models_that_it_has_measured(key, builder, tmp_path, monkeypatch):
    path, build = tmp_path / "bench.json", builder.build_forms
    for module in (bench_module, layer_forms):
        monkeypatch.setattr(module, "SHAPES", {"tiny": TINY["tiny"], "second": TINY["tiny"]})

    def interrupted(name, *arguments):
        if name == "second":
            raise KeyboardInterrupt
        return build(name, *arguments)

    monkeypatch.setattr(builder, "build_forms", interrupted)
    settings = {"tokens": 4, "device": "cpu", "seconds": 0.02, "router_gradient": key == "gradients", "output": path}
    with pytest.raises(KeyboardInterrupt):
        run_bench(["tiny", "second"], **settings)
    assert {row["model"] for row in json.loads(path.read_text())[key]} == {"tiny"}


def test_peak_memory_is_that_of_weights_and_tensors():
    model = torch.nn.Linear(1000, 10, bias=False)

    peak = layer_forms.peak_bytes(model, lambda: torch.ones(5000).add(1))
    assert peak == 4 * (10_000 + 2 * 5000)


def test_rows_of_the_router_gradient(tmp_path, capsys):
    path = tmp_path / "bench.json"
    result = run_bench(["tiny"], tokens=16, device="cpu", seconds=0.05, router_gradient=True, output=path)
    forms = {row["gradient"]: row["experts"] for row in result["gradients"]}
    assert forms == {"chosen": 1, "neighbours, 1": 1.5, "neighbours, 2": 2, "neighbours, 4": 3, "dense": 4}
    assert result["gradients"][0]["ratio"] == result["gradients"][0]["memory"] == 1
    assert all(row["rounds"] >= 5 for row in result["gradients"])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    print_bench(result)
    assert "dense" in capsys.readouterr().out


def test_bad_input(tmp_path):
    for settings, message in (
        ({"models": ["tini"]}, "did you mean `tiny`"),
        ({"device": "nowhere"}, "bench: device `nowhere` is not available"),
        ({"tokens": 0}, "`tokens` must be at least 1"),
        ({"tokens": (8, 0)}, "`tokens` must be at least 1, got 0"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"dtype": "float8"}, "known names: bfloat16, float32"),
        ({"router_gradient": True, "generate": True}, "`router_gradient` measures training steps alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_bench(**{"models": ["tiny"], "output": tmp_path / "b.json", "seconds": 0.01, **settings})


def test_the_true_shapes_are_those_of_the_models():
    """From the models' published configs."""
    shapes = {
        name: (
            shape["hidden_size"],
            shape.get("moe_intermediate_size", shape["intermediate_size"]),
            shape.get("num_local_experts", shape.get("num_experts", shape.get("n_routed_experts"))),
            shape["num_experts_per_tok"],
        )
        for name, shape in SHAPES.items()
    }
    assert shapes == {
        "mixtral-8x7b": (4096, 14336, 8, 2),
        "olmoe-1b-7b": (2048, 1024, 64, 8),
        "qwen3-30b-a3b": (2048, 768, 128, 8),
        "deepseek-v3-router": (7168, 64, 256, 8),  # but for the experts' width, 2,048
    }


def test_one_round_of_upcycling_has_no_peak_memory_without_the_check(capsys, tmp_path, monkeypatch):
    run = {"seconds_writing": 1.0, "seconds_checking": 1.0, "weight_bytes": 1, "parameters": 1, "exactness": {}}
    monkeypatch.setattr(bench_upcycle, "_upcycle", lambda *_, **__: {**run, "peak_memory_bytes": 2_000_000_000})
    for name in ("_copy", "_settle"):
        monkeypatch.setattr(bench_upcycle, name, lambda *_: 1.0)
    monkeypatch.setattr(bench_upcycle, "write_random_phi3", lambda *_: 1)
    result = bench_upcycle.run_bench_upcycle(tmp_path, rounds=1, output=tmp_path / "upcycle.json")
    assert (result["peak_memory_bytes"], result["peak_memory_bytes_with_check"]) == (None, 2_000_000_000)
    bench_upcycle.print_bench_upcycle(result)
    assert capsys.readouterr().out.count("2.00 GB") == 1


@pytest.mark.thorough
def test_bench_commit_has_a_row_for_every_arrangement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_commit, "measure_layer", lambda name, seconds: 0.5)
    result = bench_commit.run_bench_commit(tmp_path / "commit.json", processes=(1,), sizes=((2, 16), (3, 16)))
    assert json.loads((tmp_path / "commit.json").read_text()) == result
    names = ("work", "processes", "layers", "experts")
    wanted = [(work, 1, layers, 16) for work in ("commit", "log") for layers in (2, 3)]
    assert [tuple(row[name] for name in names) for row in result["rows"]] == wanted
    for row in result["rows"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["share"] == row["seconds"] / (row["layers"] * 0.5)
    for work in ("commit", "log"):
        table = bench_commit.commit_table(result, work)
        assert table.header[3] == f"{work}, ms"
        assert [[cell.text for cell in row[:3]] for row in table.rows] == [["1", "2", "16"], ["1", "3", "16"]]
    bench_commit.print_bench_commit(result)
    assert "One log, beside training steps" in capsys.readouterr().out


def test_the_loop_over_experts_computes_what_upcycled_moe_does(monkeypatch):
    monkeypatch.setattr(bench_experts, "SHAPES", TINY_EXPERTS)
    for shape, form in (("wide", "eager"), ("square", "eager"), ("square", "grouped_mm")):
        moe = bench_experts.build_experts(shape, form, torch.device("cpu"), torch.float32)
        loop, inputs = bench_experts.ExpertsLoop(moe), torch.randn(20, 16)
        torch.testing.assert_close(moe(inputs), loop(inputs))  # sums of other orders: float32's own tolerance
        moe(inputs).square().sum().backward()
        got = moe.experts.up_proj.grad.clone()
        loop(inputs).square().sum().backward()
        torch.testing.assert_close(got, torch.stack([up.weight.grad for up in loop.up]))


def test_bench_experts_has_a_row_for_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_experts, "SHAPES", TINY_EXPERTS)
    result = bench_experts.run_bench_experts(tmp_path / "experts.json", images=2, device="cpu", seconds=0.01)
    assert json.loads((tmp_path / "experts.json").read_text()) == json.loads(json.dumps(result))
    forms = [(row["shape"], row["form"], row["tokens"]) for row in result["rows"]]
    wide = [("wide", form, 12) for form in ("eager", "products")]
    square = [("square", form, 14) for form in ("eager", "grouped_mm", "products")]
    assert forms == wide + square
    table = bench_experts.experts_table(result)
    assert len(table.rows) == 5
    assert all(len(row) == len(table.header) for row in table.rows)
    with pytest.raises(ConfigError, match="`images` must be at least 1"):
        bench_experts.run_bench_experts(images=0)


@pytest.mark.parametrize(
    "run",
    [
        lambda folder: run_bench(["tiny"], output=folder),
        lambda folder: bench_commit.run_bench_commit(folder),
        lambda folder: bench_experts.run_bench_experts(folder),
        lambda folder: run_bench_evaluation("no-such-model", output=folder),
    ],
    ids=["bench", "bench-commit", "bench-experts", "bench-evaluation"],
)
def test_a_folder_as_the_result_file_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"^bench.*: `.*` is a folder, and the result is a file"):
        run(tmp_path)
