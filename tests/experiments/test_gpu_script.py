"""The GPU benchmark with tiny models on the CPU: forms, FLOPs, timing and results. No test asserts a time."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import assert_folded
from torch.utils.flop_counter import FlopCounterMode

from symphony_hf import ConfigError, EvaluationError, expert_graphs
from symphony_hf.conversion.inspection.inspect import inspect_model
from symphony_hf.experiments.bench import timing
from symphony_hf.experiments.bench.gpu import case as case_module
from symphony_hf.experiments.bench.gpu import flops, forms, memory, shapes
from symphony_hf.experiments.bench.gpu import measure as script
from symphony_hf.experiments.bench.gpu import record as record_module
from symphony_hf.experiments.bench.gpu.case import Case, Device, DoesNotFitError
from symphony_hf.experiments.bench.gpu.record import FormMeasurement, Record, header, line_of
from symphony_hf.experiments.bench.gpu.shapes import Inputs, build, config_of, random_batch
from symphony_hf.experiments.bench.timing import Limits, TimeIsUpError, Timings

ROOT = Path(__file__).parents[2]
CPU = Device("cpu", torch.device("cpu"), torch.float32, None, None)
NO_LIMIT = Limits(rounds=2, seconds=60.0, end=float("inf"))
ABSENT = (
    *("datasets", "deepspeed", "scipy", "sklearn", "matplotlib"),
    *("typer", "rich", "jsonargparse", "pandas", "bitsandbytes"),
)
BLOCK = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {ABSENT} else find_spec(name, *rest)
)
"""


@pytest.fixture(autouse=True)
def _without_bitsandbytes(monkeypatch):
    """The same optimizer for full training on every machine. Importing bitsandbytes also takes seconds."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def tiny_model(name="7.4b"):
    return build(config_of(name, tiny=True), torch.device("cpu"), torch.float32)


def idle(name):
    return flops.idle_parameters(config_of(name))


def row(**changes):
    values = dict.fromkeys(("peak_gib", "utilization", "ratio", "low", "high"))
    values |= {"model": "7.4b", "mode": "lora", "text_tokens": 16, "tokens": 16, "micro_batch": 4, "form": "stock"}
    values |= {"optimizer": "AdamW", "rounds": 5, "milliseconds": 250.0, "tokens_per_second": 256.0}
    return FormMeasurement(**{**values, "estimated_gib": 1.0, "teraflops": 0.5, **changes})


# The models.


def test_the_7_4b_has_its_parameters():
    inspected = inspect_model(build(config_of("7.4b"), torch.device("meta"), torch.bfloat16))
    phi3_mini, mlp, layers = 3_821_079_552, 3 * 3072 * 8192, 16
    routers, gates_of_no_shared_expert = layers * 4 * 3072, layers * 3072
    assert inspected.total == phi3_mini + layers * 3 * mlp + routers + gates_of_no_shared_expert
    assert inspected.total - gates_of_no_shared_expert == 7_445_154_816
    assert inspected.active == inspected.total - layers * 2 * mlp == inspected.total - idle("7.4b")


def test_the_4_2b_has_its_parameters():
    inspected = inspect_model(build(config_of("4.2b"), torch.device("meta"), torch.bfloat16))
    phi3_mini, clip_l_336 = 3_821_079_552, 303_507_456
    projector = (1024 * 3072 + 3072) + (3072 * 3072 + 3072)
    assert inspected.total == phi3_mini + clip_l_336 + 4 * projector + 4 * 1024
    assert inspected.active == inspected.total - 2 * projector == inspected.total - idle("4.2b")


@pytest.mark.parametrize("name", shapes.NAMES)
def test_weights_are_seeded_and_initialized(name):
    first, second = tiny_model(name), tiny_model(name)
    for (parameter_name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), parameter_name
    weights = [p for n, p in first.named_parameters() if n.endswith("weight") and p.dim() == 2]
    routers = [p for p in weights if len(p) == shapes.NUM_EXPERTS]
    assert len(routers) == (2 if name == "7.4b" else 1)
    for weight in routers:
        assert 0.01 < weight.std() < 0.04  # N(0, 0.02), of 64 or 128 draws


def test_images_precede_the_text_and_are_not_predicted():
    batch = random_batch(tiny_model("4.2b"), Inputs(micro_batch=3, text_tokens=7))
    image_token = shapes.TINY["vocab_size"] - 1
    assert batch["input_ids"].shape == (3, 4 + 7)
    assert (batch["input_ids"][:, :4] == image_token).all()
    assert (batch["labels"][:, :4] == -100).all()
    assert not (batch["input_ids"][:, 4:] == image_token).any()
    assert torch.equal(batch["labels"][:, 4:], batch["input_ids"][:, 4:])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)


# The forms.


@pytest.mark.parametrize("name", shapes.NAMES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_forms_are_one_set_of_weights(name, mode):
    model = tiny_model(name)
    made = forms.training_forms(model, mode)
    trained = {form: {n: p for n, p in made[form].named_parameters() if p.requires_grad} for form in made}
    assert {n: id(p) for n, p in trained["stock"].items()} == {n: id(p) for n, p in trained["symphony"].items()}
    assert ("lora" in "".join(trained["stock"])) == (mode == "lora")
    assert any(p.shape[0] == shapes.NUM_EXPERTS and p.dim() == 2 for p in trained["stock"].values()), "no router trains"
    frozen = {form: {p.data_ptr() for p in made[form].parameters() if p.dim() > 1} for form in made}
    assert mode == "lora" or frozen["stock"] == frozen["symphony"]
    batch = random_batch(model, Inputs(2, 8))
    losses = [made[form](**batch).loss for form in made]
    assert torch.equal(*losses)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_each_symphony_step_moves_the_graphs_once_and_the_weights_of_both_forms(mode):
    model = tiny_model()
    made = forms.training_forms(model, mode)
    optimizer = forms.make_optimizer(forms.optimizer_name(mode), made)
    batch = random_batch(model, Inputs(2, 8))
    graphs = [p for n, p in made["symphony"].named_buffers() if n.endswith("updates") and "original_module" not in n]
    before = {n: p.detach().clone() for n, p in made["stock"].named_parameters() if p.requires_grad}
    forms.training_step(made["stock"], batch, optimizer, has_graphs=False)
    assert {int(updates) for updates in graphs} == {0}
    for count in (1, 2):
        forms.training_step(made["symphony"], batch, optimizer, has_graphs=True)
        assert {int(updates) for updates in graphs} == {count}
    assert all(p.grad is None for p in made["stock"].parameters() if p.numel() > 0)
    after = dict(made["stock"].named_parameters())
    assert any(not torch.equal(value, after[n]) for n, value in before.items())


@pytest.mark.thorough
def test_a_training_graph_does_not_change_the_routing():
    model = tiny_model()
    made = forms.training_forms(model, "full")
    batch = random_batch(model, Inputs(4, 16))
    for _ in range(20):
        made["symphony"](**batch).loss.backward()
        forms.update_graphs(made["symphony"])
    with torch.no_grad():
        stock, symphony = (made[form].eval()(input_ids=batch["input_ids"]).logits for form in ("stock", "symphony"))
    # Twenty updates move a graph by 2e-5 of its way, and logits of this size by less than that; a token that goes to
    # another expert moves them by 1e-2.
    torch.testing.assert_close(symphony, stock, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", shapes.NAMES)
def test_inference_forms_compute_the_same_through_moved_graphs(name):
    model = tiny_model(name)
    made = forms.inference_forms(model)
    for adjacency in expert_graphs(made["symphony"]).values():
        assert not torch.equal(adjacency, adjacency.diagonal().diag())
    batch = random_batch(model, Inputs(2, 8))
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        stock, symphony, folded = (made[form](**prompt).logits for form in ("stock", "symphony", "folded"))
    assert_folded(stock, symphony)
    assert torch.equal(stock, folded)
    pointers = [{p.data_ptr() for p in form.parameters() if p.numel()} for form in made.values()]
    own = len(expert_graphs(made["symphony"]))
    assert [len(pointers[one] - pointers[other]) for one, other in ((0, 1), (0, 2), (2, 1))] == [own] * 3


def test_optimizers(monkeypatch):
    made = {"stock": tiny_model()}
    assert forms.optimizer_name("inference") is None
    assert type(forms.make_optimizer("AdamW", made)) is torch.optim.AdamW
    assert forms.optimizer_name("full") == "Adafactor"
    optimizer = forms.make_optimizer("Adafactor", made)
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == made["stock"].num_parameters()
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    assert forms.optimizer_name("full") == "AdamW8bit"


# The counts.


def test_flops_by_hand():
    """Phi-3-mini has 4 matrices of 3072 x 3072 and 3 of 3072 x 8192 per layer, and an LM head of 3072 x 32064."""
    tokens = 2048
    dense = 16 * (4 * 3072**2 + 3 * 3072 * 8192)
    sparse = 16 * (4 * 3072**2 + 2 * 3 * 3072 * 8192 + 4 * 3072 + 3072)
    weights, head = dense + sparse, 3072 * 32064
    causal = 32 * 4 * 3072 * tokens**2 // 2
    config = config_of("7.4b")
    assert flops.model_flops(config, "full", tokens) == 6 * (weights + head) * tokens + 3 * causal
    assert flops.model_flops(config, "inference", tokens) == 2 * weights * tokens + 2 * head + causal
    adapters, routers = 32 * 4 * 2 * 16 * 3072, 16 * 4 * 3072
    trained = 4 * (weights + head) + 6 * adapters + 2 * routers
    assert flops.model_flops(config, "lora", tokens) == trained * tokens + 3 * causal


def test_flops_of_an_image_by_hand():
    """CLIP-L uses 23 of 24 layers, 576 patches and a class token. The projector uses 2 of 4 experts."""
    text = flops.model_flops(config_of("4.2b"), "full", 512) - 6 * 1088 * (
        32 * (4 * 3072**2 + 3 * 3072 * 8192) + 3072 * 32064
    )
    tower = 23 * (6 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 3 * 4 * 1024 * 577**2)
    patches = 4 * 576 * 3 * 14 * 14 * 1024  # no gradient of the pixels
    projector = 6 * 576 * (2 * (1024 * 3072 + 3072 * 3072) + 4 * 1024)
    assert text == tower + patches + projector + 3 * 32 * 4 * 3072 * 1088**2 // 2


@pytest.mark.thorough
@pytest.mark.parametrize("name", shapes.NAMES)
@pytest.mark.parametrize("mode", flops.MODES)
def test_flops_are_those_that_pytorch_counts(name, mode):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    config, inputs = model.config, Inputs(1, 24)
    batch = random_batch(model, inputs)
    made = forms.inference_forms(model) if mode == "inference" else forms.training_forms(model, mode)
    stock = made["stock"]
    stock.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        if mode == "inference":
            forms.prefill_step(stock, batch)
        else:
            stock(**batch, use_cache=False).loss.backward()
    parts = flops.parts_of(config, mode, inputs.text_tokens)
    expected = sum(part.flops for part in parts)
    expected += parts[0].attention * (1 if mode == "inference" else 3)  # eager attention takes the whole square
    if name == "4.2b":
        vision, tokens = config.vision_config, 5
        unused = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        expected += 2 * unused * tokens + 4 * vision.hidden_size * tokens**2  # the last layer runs, for nothing
    if (name, mode) == ("4.2b", "lora"):
        # With checkpointing transformers has all embeddings require a gradient, which here no one needs.
        expected += sum(2 * (part.weights * part.tokens + part.attention) for part in parts[3:])
    # What is left are the angles of the rotary embedding.
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_device_peaks():
    assert flops.peak_tflops("NVIDIA H100 80GB HBM3") == 989.5
    assert flops.peak_tflops("NVIDIA H100 PCIe") == 756.5
    assert flops.peak_tflops("NVIDIA H200") == 989.5
    assert flops.peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert flops.peak_tflops("Some other device") is None


# The memory.


def test_the_estimate_counts_what_training_holds():
    config, inputs = config_of("7.4b"), Inputs(1, 512)
    shapes = memory.parameter_shapes(config)

    def gib(mode, optimizer):
        needed = memory.estimate(config, shapes, mode, optimizer, torch.bfloat16, inputs)
        return [round(value / 2**30, 1) for value in (needed.weights, needed.gradients, needed.optimizer)]

    assert gib("full", "AdamW8bit") == [13.9, 13.9, 14.1]
    assert gib("full", "Adafactor") == [13.9, 13.9, 0.0]
    assert gib("lora", "AdamW") == [13.9, 0.0, 0.1]
    assert gib("inference", None) == [13.9, 0.0, 0.0]
    text = str(memory.estimate(config, shapes, "full", "AdamW8bit", torch.bfloat16, inputs))
    assert text.startswith("42.4 GiB (weights 13.9, gradients 13.9, optimizer 14.1, activations 0.6)")


def test_the_micro_batch_is_the_largest_that_fits():
    needs = {1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0}.get
    assert memory.fitting_micro_batch(needs, 9, None) == 8
    assert memory.fitting_micro_batch(needs, 8, 80.0 / memory.USABLE) == 8
    assert memory.fitting_micro_batch(needs, 8, 79.0 / memory.USABLE) == 4
    assert memory.fitting_micro_batch(needs, 0, None) == 1
    assert memory.fitting_micro_batch(needs, 8, 9.0) == 0


def test_what_does_not_fit_is_not_built(monkeypatch):
    monkeypatch.setattr(case_module, "_measure", lambda *_: pytest.fail("built"))
    small = replace(CPU, free_bytes=16 * 2**30)
    with pytest.raises(
        DoesNotFitError, match=r"by the estimate, one sequence does not fit: .*, and 16\.0 GiB were free"
    ):
        case_module.measure(Case("7.4b", "full", 512), small, 8192, NO_LIMIT)


def test_out_of_memory_halves_the_micro_batch(monkeypatch):
    tried = []

    def _measure(case, device, micro_batch, needed, limits):
        tried.append(micro_batch)
        if micro_batch > 2:
            raise torch.OutOfMemoryError("no more")
        return [row(micro_batch=micro_batch)]

    monkeypatch.setattr(case_module, "_measure", _measure)
    rows = case_module.measure(Case("7.4b", "lora", 16, tiny=True), CPU, 128, NO_LIMIT)
    assert tried == [8, 4, 2]
    assert rows[0].micro_batch == 2


# The rounds.


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by the given time of each step."""

    class Clock:
        now = 0.0

        def step(self, seconds, log=None, name=""):
            def run():
                self.now += next(seconds) if hasattr(seconds, "__next__") else seconds
                if log is not None:
                    log.append(name)
                return torch.zeros(())

            return run

    moved = Clock()
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(timing.time, name, lambda: moved.now)
    return moved


def test_ratios_are_of_the_same_round(clock):
    steps = {"stock": clock.step(iter([1.0, 2.0, 4.0])), "symphony": clock.step(iter([1.5, 2.0, 8.0]))}
    timings = timing.run_rounds(steps, torch.device("cpu"), Limits(3, 60.0, 60.0), lambda: None)
    assert timings.seconds == {"stock": [1.0, 2.0, 4.0], "symphony": [1.5, 2.0, 8.0]}
    assert timings.ratios("symphony", "stock") == [1.5, 1.0, 2.0]
    assert timings.peak_bytes == {}


def test_every_form_runs_in_every_position(clock):
    log = []
    names = ("stock", "symphony", "noise")
    steps = {name: clock.step(0.1, log, name) for name in names}
    timing.run_rounds(steps, torch.device("cpu"), Limits(6, 60.0, 60.0), lambda: None)
    orders = [tuple(log[at : at + 3]) for at in range(0, 18, 3)]
    assert set(orders) == set(itertools.permutations(names))


def test_rounds_end_in_time(clock):
    def count(rounds_asked, seconds, end):
        clock.now = 0.0
        steps = {"stock": clock.step(1.0), "symphony": clock.step(1.0)}
        limits = Limits(rounds_asked, seconds, end)
        return len(timing.run_rounds(steps, torch.device("cpu"), limits, lambda: None).seconds["stock"])

    assert count(20, 1000.0, 1000.0) == 20
    assert count(20, 16.0, 1000.0) == 8  # rounds of two seconds
    assert count(20, 1.0, 1000.0) == timing.MIN_ROUNDS
    assert count(20, 1000.0, 16.0) == 8
    assert count(2, 1000.0, 1000.0) == 2
    with pytest.raises(TimeIsUpError):
        count(20, 1000.0, 9.0)  # the fifth round is under way


def test_warm_up_is_not_timed_and_ends_in_time(clock):
    ticks = []
    timing.warm_up({"stock": clock.step(1.0)}, Limits(5, 60.0, 60.0), lambda: ticks.append(1))
    assert len(ticks) == timing.WARM_UP
    with pytest.raises(TimeIsUpError):
        timing.warm_up({"stock": clock.step(1.0)}, Limits(5, 60.0, 0.0), lambda: None)


# The rows.


def test_rows_are_made_of_what_was_timed():
    timings = Timings(
        {"stock": [0.1, 0.2, 0.4], "symphony": [0.1, 0.3, 0.4], "noise": [0.2, 0.2, 0.2]},
        {"stock": 2 * 2**30, "symphony": 3 * 2**30, "noise": 2 * 2**30},
    )
    case = Case("7.4b", "lora", 16, tiny=True)
    device = replace(CPU, peak_tflops=2.0)
    stock, symphony, noise = case_module.rows_of(case, device, 4, memory.Estimate(2**30, 0, 0, 0), timings)
    assert (stock.milliseconds, stock.tokens_per_second, stock.peak_gib, stock.rounds) == (200.0, 4 * 16 / 0.2, 2.0, 3)
    assert (stock.ratio, stock.low, stock.high) == (None, None, None)
    assert symphony.milliseconds == 300.0
    assert (symphony.low, symphony.ratio, symphony.high) == pytest.approx((1.0, 1.0, 1.25))
    assert noise.ratio == pytest.approx(1.0)
    teraflops = 4 * flops.model_flops(config_of("7.4b", tiny=True), "lora", 16) / 1e12
    assert symphony.teraflops == teraflops
    assert symphony.utilization == pytest.approx(teraflops / 0.3 / 2.0)
    assert stock.estimated_gib == 1.0


def test_a_line_has_the_rows_numbers_and_no_other():
    full = row(form="symphony", peak_gib=23.46, utilization=0.4321, ratio=1.01234, low=1.0, high=1.02)
    assert " ".join(line_of(full).split()) == (
        "7.4b lora AdamW 4 x 16 symphony 250.0 256 23.5 43.2% 1.0123 1.0000 - 1.0200 5"
    )
    unknown = line_of(row(mode="inference", optimizer=None))
    assert " ".join(unknown.split()) == "7.4b inference - 4 x 16 stock 250.0 256 - - - - 5"
    assert len(header()) == len(line_of(full))


def test_a_measurement_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="lora, stock: milliseconds, tokens_per_second is not finite"):
        row(milliseconds=float("nan"), tokens_per_second=float("inf"))


def test_a_result_file_continues_only_on_the_same_machine(tmp_path):
    path = tmp_path / "gpu.json"
    first = Record(path, {"device": "A", "peak_tflops": 989.5})
    first.note_model("7.4b", 10, 5)
    first.add([row(), row(form="symphony", ratio=1.0)])
    first.leave_out("7.4b", "full", 16, "the time was up")
    assert first.left_out() == ["not measured: 7.4b full, 16 tokens of text: the time was up"]
    second = Record(path, {"device": "A", "peak_tflops": 989.5})
    assert second.rows == [row(), row(form="symphony", ratio=1.0)]
    assert second.has("7.4b", "lora", 16)
    assert not second.has("7.4b", "lora", 32)
    assert json.loads(path.read_text())["not_measured"] == []
    with pytest.raises(ConfigError, match=r"has measurements of .*'A'.*, not .*'B'"):
        Record(path, {"device": "B"})
    for content in ("{", "[]", '{"measured_on": {}, "models": {}, "rows": [{"model": 1}]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="is not a result of this benchmark"):
            Record(path, {"device": "A"})
    with pytest.raises(ConfigError, match="not a result"):
        Record(tmp_path, {"device": "A"})


# The script.


def run_script(path, *options):
    return script.main(["--tiny", "--steps", "2", "--max_tokens", "32", "--output", str(path), *options])


@pytest.mark.thorough
def test_a_killed_run_keeps_its_rows_and_the_next_continues(tmp_path, monkeypatch, capsys):
    path, seen = tmp_path / "gpu.json", []
    write = record_module.write_json

    def write_and_read(target, values):
        write(target, values)
        seen.append(len(json.loads(target.read_text())["rows"]))

    measured = []

    def measure(case, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return [row(mode=case.mode, text_tokens=case.text_tokens, form=form) for form in ("stock", "symphony")]

    monkeypatch.setattr(record_module, "write_json", write_and_read)
    monkeypatch.setattr(script, "measure", measure)
    options = ["--model", "7.4b", "--mode", "lora", "inference"]
    with pytest.raises(KeyboardInterrupt):
        run_script(path, *options)
    assert sorted(set(seen)) == [0, 2, 4]
    printed = capsys.readouterr().out
    assert printed.splitlines()[1:] == [
        line_of(FormMeasurement(**values)) for values in json.loads(path.read_text())["rows"]
    ]
    first, measured[:] = list(measured), []
    assert run_script(path, *options) == 0
    assert [(case.mode, case.text_tokens) for case in first + measured] == [
        ("lora", 16),
        ("lora", 32),
        ("inference", 16),
        ("inference", 32),
    ]
    assert len(json.loads(path.read_text())["rows"]) == 8


def test_cases_without_time_are_reported(tmp_path, capsys):
    assert run_script(tmp_path / "gpu.json", "--minutes", "1e-9", "--model", "7.4b", "--mode", "full") == 1
    values = json.loads((tmp_path / "gpu.json").read_text())
    assert values["rows"] == []
    assert [(left_out["text_tokens"], left_out["reason"]) for left_out in values["not_measured"]] == [
        (16, "the time was up"),
        (32, "the time was up"),
    ]
    assert "not measured: 7.4b full, 16 tokens of text: the time was up" in capsys.readouterr().out


def test_outputs_that_are_not_finite_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(case_module, "make_steps", lambda *_: {"stock": lambda: torch.tensor(float("nan"))})
    with pytest.raises(EvaluationError, match="lora, 16 tokens of text: the last step of the stock form returned nan"):
        case_module.measure(Case("7.4b", "lora", 16, tiny=True), CPU, 32, NO_LIMIT)
    assert run_script(tmp_path / "gpu.json", "--model", "7.4b", "--mode", "lora") == 1
    assert "measure.py: 7.4b lora, 16 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tiny", "--steps", "0"], "--steps must be above 0, got 0"),
        (["--tiny", "--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--tiny", "--text_tokens", "16", "1"], r"--text_tokens must be from 2 to 4096 \(qwen2_moe\), got \[16, 1\]"),
        (["--tiny", "--model", "4.2b", "--text_tokens", "4095"], r"from 2 to 4092 \(llava\)"),
        (["--tiny", "--model", "7b"], "invalid choice: '7b'"),
        ([], "there is no CUDA device here; --tiny"),
    ],
)
def test_bad_options(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        script.main(options)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.thorough
def test_every_case_runs_from_a_bare_copy_with_few_libraries(tmp_path):
    """The README's command in a new process without the libraries that it must not need."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = tmp_path / "gpu.json"
    options = ["--tiny", "--steps", "2", "--max_tokens", "32", "--peak_tflops", "1", "--output", str(path)]
    inherited = os.environ.get("PYTHONPATH", "")
    result = subprocess.run(
        [sys.executable, "-m", "symphony_hf.experiments.bench.gpu.measure", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), ".", inherited])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(path.read_text())
    assert values["not_measured"] == []
    rows = [FormMeasurement(**row) for row in values["rows"]]
    expected = [
        (model, mode, length, form)
        for model in shapes.NAMES
        for mode in flops.MODES
        for length in (16, 32)
        for form in (
            ["stock", "symphony", "folded", "noise"] if mode == "inference" else ["stock", "symphony", "noise"]
        )
    ]
    assert [(row.model, row.mode, row.text_tokens, row.form) for row in rows] == expected
    assert result.stdout.splitlines() == [header(), *map(line_of, rows), f"written to {path}"]
    for measured in rows:
        assert measured.optimizer == {"lora": "AdamW", "full": "Adafactor", "inference": None}[measured.mode]
        assert measured.peak_gib is None  # a CPU's is not looked at
        assert measured.utilization == pytest.approx(measured.teraflops / measured.milliseconds * 1000)
        assert (measured.ratio is None) == (measured.form == "stock")
