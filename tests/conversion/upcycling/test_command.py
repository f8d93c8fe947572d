"""`symphony upcycle` and `symphony bench-upcycle` in a terminal."""

import json
import os
import subprocess
import sys

import pytest
from dense import load, run, save_dense
from rich.console import Console
from typer.testing import CliRunner

from symphony_hf import ConfigError, EvaluationError, UpcycleError
from symphony_hf.cli import app
from symphony_hf.conversion.upcycling.upcycle import print_result
from symphony_hf.experiments.bench.upcycle import print_bench_upcycle, run_alone, run_bench_upcycle

pytestmark = pytest.mark.filterwarnings("ignore:upcycle. .* of this `qwen2_moe`")  # settings that llama.cpp ignores


def invoke(*words):
    return CliRunner().invoke(app, ["upcycle", *map(str, words)])


def test_the_command_says_what_it_made_and_what_the_check_saw(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    words = ["--to", "qwen2_moe", "--num_experts", 4, "--top_k", 3, "--layers", "0, 3", "--dtype", "bfloat16"]
    result = invoke(source, tmp_path / "moe", *words)
    assert result.exit_code == 0, result.output
    config = load(tmp_path / "moe").config
    assert (config.num_experts, config.num_experts_per_tok, config.mlp_only_layers) == (4, 3, [1, 2])
    assert "experts in 2 layers" in result.output
    assert "checked on 64 tokens: logits differ from the dense model's by" in result.output
    assert f"Written to {tmp_path / 'moe'}" in result.output


@pytest.mark.parametrize("layers", ["even", "1,", "1,,2", "1.5", "²"])
def test_layers_that_are_no_numbers(layers, tmp_path):
    _, source = save_dense(tmp_path / "dense")
    result = invoke(source, tmp_path / "moe", "--layers", layers)
    assert isinstance(result.exception, ConfigError), result.output
    assert "`layers` must be" in str(result.exception)


def test_refusals_reach_the_terminal(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    result = invoke(source, tmp_path / "moe", "--to", "phimoe")
    assert isinstance(result.exception, UpcycleError)


def test_what_was_not_checked_is_said(tmp_path):
    _, source = save_dense(tmp_path / "dense", "phi3, windows")
    console = Console(record=True, width=200)
    print_result(run(source, tmp_path / "moe", to="qwen2_moe", noise=0.1), console)
    text = console.export_text()
    assert "not checked against the dense model" in text
    assert "FlashAttention" in text


@pytest.mark.slow
def test_the_bench(tmp_path):
    output = tmp_path / "bench.json"
    result = run_bench_upcycle(tmp_path, shrink=32, rounds=2, output=output)
    assert json.loads(output.read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert len(result["seconds"]) == len(result["seconds_of_a_copy"]) == 2
    assert result["check"]["difference"] < 1e-4
    console = Console(record=True)
    print_bench_upcycle(result, console)
    assert "with the check" in console.export_text()


def test_the_bench_refuses_what_it_cannot_do_before_it_writes(tmp_path):
    for options, match in (
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"shrink": 0}, "`shrink` must divide Phi-3-mini's 32 heads, got 0"),
        ({"shrink": 3}, "`shrink` must divide"),
        ({"folder": tmp_path / "nowhere"}, "which is no folder"),
        ({"output": tmp_path}, "is a folder, and the result is a file"),
    ):
        with pytest.raises(ConfigError, match=match):
            run_bench_upcycle(**{"folder": tmp_path, "output": tmp_path / "bench.json", **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path, capfd):
    """A refusal is reported by its reason alone; any other error with a traceback."""
    values = {"source": str(tmp_path / "nowhere"), "target": str(tmp_path / "moe")}
    with pytest.raises(EvaluationError, match="nowhere`: no such folder"):
        run_alone("bench-upcycle", "symphony_hf.experiments.bench.upcycle", json.dumps(values))
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(EvaluationError, match="bench-upcycle: a process ended with exit code 1"):
        run_alone("bench-upcycle", "symphony_hf.experiments.bench.upcycle", "no JSON")
    assert "JSONDecodeError" in capfd.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Eight layers may take half a layer's float32 weights more than two, although six layers were added."""
    # What is freed goes back to the system at once, so that the peak is what was in use, not what malloc kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_key_value_heads": 4}
    peaks = []
    for layers in (2, 8):
        _, source = save_dense(tmp_path / f"{layers}", num_hidden_layers=layers, **wide)
        values = {"source": str(source), "target": str(tmp_path / f"moe-{layers}"), "num_experts": 4}
        command = [sys.executable, "-m", "symphony_hf.experiments.bench.upcycle", json.dumps(values)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])
    layer = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert peaks[1] - peaks[0] < layer / 2
