"""Missing packages and devices are reported in one line, before data or weights are loaded."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from symphony_hf import ConfigError
from symphony_hf.recipe import load_recipe
from symphony_hf.train import main as train_main
from symphony_hf.training import runner
from symphony_hf.training.arguments import training_arguments

RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = RECIPES / "quickstart" / "config.yaml"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


NEEDS = {
    "4-bit": ("mixtral-8x7b-qlora/config.yaml", [], "bitsandbytes", "bitsandbytes"),
    "optimizer": ("quickstart/config.yaml", ["--optim", "adamw_8bit"], "bitsandbytes", "bitsandbytes"),
    "strategy": ("olmoe-7b-sft/full.yaml", [], "deepspeed", "deepspeed"),
    "deepspeed": ("quickstart/config.yaml", ["--deepspeed", "ds.json"], "deepspeed", "deepspeed"),
    "chat": ("olmoe-7b-sft/smoke.yaml", [], "trl", "trl"),
    "tracker": ("quickstart/config.yaml", ["--report_to", "wandb"], "wandb", "tracking"),
    "trackers": ("quickstart/config.yaml", ["--report_to", "[tensorboard, trackio]"], "trackio", "tracking"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_is_one_line(name, monkeypatch, capsys, tmp_path):
    recipe, words, package, extra = NEEDS[name]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
    )
    words = [*words, "--output.directory", str(tmp_path / "run")]
    assert train_main([str(RECIPES / recipe), *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"error: this recipe needs {package}, which is not installed: pip install 'symphony-hf[{extra}]'"
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_needed_under_its_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(ConfigError, match="needs deepspeed"):
        training_arguments(load_recipe(QUICKSTART))


GPU_ONLY = {
    "fp16": ({"fp16": True, "use_cpu": True}, "`fp16` needs a GPU"),
    "bf16": ({"bf16": True}, "bf16"),  # in TrainingArguments' words
    "tf32": ({"tf32": True}, "tf32"),
    "attention": ({"model.attention": "flash_attention_2"}, "attention `flash_attention_2` needs a GPU"),
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU_ONLY)
def test_gpu_settings_are_refused_on_a_cpu(name):
    overrides, message = GPU_ONLY[name]
    with pytest.raises(ConfigError, match=message):
        training_arguments(load_recipe(QUICKSTART, overrides))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_launch_for_a_gpu_is_refused_on_a_cpu(monkeypatch):
    """With `single_gpu.yaml`, which accelerate would run on the CPU. Its default configuration allows both."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    training_arguments(load_recipe(QUICKSTART))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="is for a GPU, and there is none"):
        training_arguments(load_recipe(QUICKSTART))
    training_arguments(load_recipe(QUICKSTART, {"use_cpu": True}))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 processes were started on a machine with 2 GPUs"):
        training_arguments(load_recipe(QUICKSTART))


@pytest.mark.parametrize("symphony", [{}, {"symphony.strength": 0.5}])
def test_several_gpus_in_one_process_are_refused(symphony, monkeypatch, tmp_path):
    """Trainer would train by DataParallel, with a batch for each. A dry run says so."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    recipe = load_recipe(QUICKSTART, {"output.directory": str(tmp_path / "run"), "use_cpu": True, **symphony})
    recipe = recipe if symphony else dataclasses.replace(recipe, symphony=None)
    with pytest.raises(ConfigError, match=r"sees 2 GPUs.*--num_processes 2.*CUDA_VISIBLE_DEVICES=0"):
        runner.prepare_run(recipe)
    assert runner.prepare_dry_run(recipe)[1] == ["launch: one process for each of the 2 GPUs here, or one GPU"]


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_partitioned_4_bit_weights_are_refused(strategy, monkeypatch):
    """Whether the recipe or the launcher requests partitioning."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: object())
    monkeypatch.setattr(runner, "expected_strategy", lambda arguments: strategy)
    path = RECIPES / "mixtral-8x7b-qlora" / "config.yaml"
    with pytest.raises(ConfigError, match="4-bit weights cannot be partitioned"):
        runner.prepare_run(load_recipe(path, {"use_cpu": True, "bf16": False}))


def test_the_output_directory_has_one_name():
    """The Trainer's own would split a run: checkpoints there, and the model and results in the recipe's."""
    with pytest.raises(ConfigError, match=r"`output_dir: runs/b`: .*give `--output.directory`"):
        training_arguments(load_recipe(QUICKSTART, {"output_dir": "runs/b"}))


def test_a_stream_needs_max_steps():
    recipe = load_recipe(QUICKSTART, {"max_steps": -1, "data.path": "owner/name", "data.streaming": True})
    with pytest.raises(ConfigError, match="set `max_steps`"):
        training_arguments(recipe)


def test_the_best_checkpoint_is_by_the_validation_loss():
    def found(**settings):
        arguments = training_arguments(load_recipe(QUICKSTART, {"use_cpu": True, **settings}))
        return arguments.metric_for_best_model, arguments.greater_is_better

    assert found() == (None, None)
    assert found(eval_strategy="steps") == ("loss", False)
    assert found(eval_strategy=False) == found(eval_strategy="no")  # what YAML reads `no` as
    assert found(eval_strategy="steps", metric_for_best_model="accuracy") == ("accuracy", True)
