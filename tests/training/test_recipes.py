"""Every recipe loads, its baseline differs only in strength, and its smoke recipe runs."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from small_runs import smoke_overrides
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SchedulerType

from symphony_hf.checkpoints.folder import open_folder
from symphony_hf.recipe import load_recipe
from symphony_hf.settings import parse_settings
from symphony_hf.training.arguments import training_arguments
from symphony_hf.training.models import empty_model
from symphony_hf.training.planning.settings import GLUE_EXAMPLES
from symphony_hf.training.quickstart_settings import RECIPE as QUICKSTART

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate")
SMOKE = [path for path in FILES if path.name.startswith("smoke")]
EXAMPLES = {"olmoe-7b-sft", "mixtral-8x7b-qlora"}
"""Recipes whose smoke runs the default run has."""
PHI3_MINI, PHI3_MLP = 3_821_079_552, 3 * 3072 * 8192
UPCYCLED = PHI3_MINI + 16 * (3 * PHI3_MLP + 4 * 3072)  # three more copies and a router in every other layer
assert UPCYCLED == 7_445_154_816
# Zeros that servers ask of Qwen2-MoE: biases of queries, keys and values; a shared expert of width 16, and its gate.
ZEROS = 32 * 3 * 3072 + 16 * (3 * 3072 * 16 + 3072)
PARAMETERS = {
    "phi3-smoe-7.4b-glue": UPCYCLED + ZEROS,
    "phi3-smoe-7.4b-sft": UPCYCLED + ZEROS,
    "olmoe-7b-sft": 6_919_161_856,
    "mixtral-8x7b-qlora": 46_702_792_704,
    "llava-smoe-4.2b": 4_174_947_328,
    "wikitext103-216m": 215_679_863,  # published
}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def on_this_machine(path):
    """A recipe's training settings without those that need GPUs and their libraries."""
    gpu_only = {"bf16": False, "use_cpu": True, "optim": "adamw_torch", "launch.strategy": None}
    return load_recipe(path, {**gpu_only, "model.quantization": None})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_recipe_loads(path):
    recipe = on_this_machine(path)
    training_arguments(recipe)
    if recipe.symphony is None:
        return
    baseline = load_recipe(path, {"symphony.strength": 0})
    whole = load_recipe(path)
    assert dataclasses.replace(baseline, symphony=whole.symphony) == whole
    assert dataclasses.replace(baseline.symphony, strength=whole.symphony.strength) == whole.symphony


def test_settings_have_their_annotated_types_after_a_script_was_parsed(tmp_path, monkeypatch):
    """HfArgumentParser narrows `SchedulerType | str` to SchedulerType in the fields that later classes inherit."""
    for field in dataclasses.fields(TrainingArguments):
        monkeypatch.setattr(field, "type", field.type)  # so that it is restored
    HfArgumentParser(TrainingArguments)
    later = dataclasses.make_dataclass("Later", [], bases=(TrainingArguments,))
    assert later.__init__.__annotations__["lr_scheduler_type"] is SchedulerType
    given = {"lr_scheduler_type": "cosine", "learning_rate": "1e-4", "output_dir": str(tmp_path), "use_cpu": True}
    arguments = parse_settings(later, given, "train")
    assert (arguments.lr_scheduler_type, arguments.learning_rate) == (SchedulerType.COSINE, 1e-4)


@pytest.mark.parametrize("task", GLUE_EXAMPLES)
def test_every_task_of_glue_is_trained_and_evaluated_past_its_warm_up(task):
    arguments = training_arguments(on_this_machine(RECIPES / "phi3-smoe-7.4b-glue" / "config.yaml"))
    per_step = 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    steps = math.ceil(arguments.num_train_epochs * GLUE_EXAMPLES[task] / per_step)
    assert 0 < arguments.get_warmup_steps(steps) < steps / 10
    assert arguments.eval_strategy == arguments.save_strategy == "epoch"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_every_recipe_has_a_page_and_a_smoke_recipe(folder):
    page = (folder / "README.md").read_text()
    assert f"recipes/{folder.name}/config.yaml" in page
    assert "--symphony.strength 0" in page
    assert folder.name == "quickstart" or (folder / "smoke.yaml").exists()


def test_the_quickstarts_recipe_is_the_packages():
    """Each a file of its own: where git makes no symbolic links, a link is a text file with a path in it."""
    assert (RECIPES / "quickstart" / "config.yaml").read_bytes() == QUICKSTART.read_bytes()
    assert [path for path in RECIPES.rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_their_size(name):
    """Parameters are counted on the meta device. OLMoE's and Mixtral's counts are published."""
    model = empty_model(load_recipe(RECIPES / name / "config.yaml"))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("path", SMOKE, ids=name_of)
def test_smoke_recipes_differ_only_in_size(path):
    """Otherwise a smoke recipe says nothing about its recipe."""
    smoke, whole = load_recipe(path), load_recipe(path.parent / "config.yaml")
    assert smoke.symphony == whole.symphony
    assert smoke.peft == whole.peft
    assert smoke.data.kind == whole.data.kind
    assert (smoke.data.packing, smoke.data.streaming) == (whole.data.packing, whole.data.streaming)
    assert yaml.safe_load(path.read_text())["base"] == "config.yaml"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.parent.name in EXAMPLES else pytest.mark.thorough, id=name_of(path))
        for path in SMOKE
    ],
)
def test_a_smoke_recipe_runs(path, shared_runs):
    folder, results = shared_runs.smoke(path)
    stored = json.loads((folder / "run" / "results.json").read_text())
    assert stored["test"] == results["test"]
    assert results["steps"] == 2
    page = (folder / "run" / "report.md").read_text()
    assert "a command" in page
    for name, version in results["versions"].items():
        assert f"{name} {version}" in page
    assert (folder / "run" / "graphs.png").exists()
    card = ModelCard.load(folder / "run" / "final" / "README.md")
    assert card.data.tags[0] == "symphony-smoe"
    assert "NAMESPACE/run" in card.text
    assert (folder / "run" / "final" / "graphs.png").exists()
    assert len(card.data.eval_results) > 0
    open_folder(folder / "run")  # nothing in it that a push would refuse


LAUNCHERS = {
    "ddp": "torch.distributed.run --standalone --nproc_per_node 2",
    "zero2": f"accelerate.commands.launch --config_file {RECIPES}/accelerate/zero2.yaml --num_processes 2 "
    "--mixed_precision no",
    "zero3": f"accelerate.commands.launch --config_file {RECIPES}/accelerate/zero3.yaml --num_processes 2 "
    "--mixed_precision no",
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", LAUNCHERS)
@pytest.mark.parametrize("path", SMOKE, ids=name_of)
def test_a_smoke_recipe_runs_in_two_processes(path, strategy, tmp_path):
    if strategy != "ddp":
        pytest.importorskip("deepspeed")
    overrides = {**smoke_overrides(tmp_path), "launch.strategy": strategy, "launch.processes": 2}
    words = [word for name, value in overrides.items() for word in (f"--{name}", json.dumps(value))]
    result = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[strategy].split(), "-m", "symphony_hf.train", str(path), *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "SYMPHONY_HF_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["processes"], results["strategy"], results["steps"]) == (2, strategy, 2)
