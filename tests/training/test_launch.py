"""The launch that accelerate runs is compared with the requested one, before anything is loaded."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from models import make_ids, make_model
from transformers import Trainer, TrainingArguments

from symphony_hf import ConfigError, SymphonyCallback, symphonize
from symphony_hf.recipe import LaunchSection
from symphony_hf.settings import parse_settings
from symphony_hf.training.launch import Request, check_launch, expected_strategy, launch_command, requests_of

LAUNCHER_VARIABLES = ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def arguments(**values):
    stand_in = {"deepspeed": None, "deepspeed_plugin": None, "fsdp": None, "world_size": 1}
    return SimpleNamespace(**{**stand_in, "device": torch.device("cpu"), **values})


def plugin(stage):
    return SimpleNamespace(zero_stage=stage)


def test_requests_are_collected(monkeypatch):
    assert requests_of(LaunchSection(), arguments()) == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    requested = requests_of(LaunchSection(processes=4, strategy="zero3"), arguments(deepspeed="ds.json"))
    assert requested == [
        Request("the recipe", "processes", 4),
        Request("the recipe", "strategy", "zero3"),
        Request("the train section", "strategy", "zero"),
        Request("the launcher", "processes", 4),
        Request("the launcher", "strategy", "zero3"),
    ]
    check_launch(requested, 4, "zero3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")  # which says the stage
    check_launch(requests_of(LaunchSection(), arguments()), 4, "zero1")


@pytest.mark.parametrize(
    ("wanted", "processes", "strategy"),
    [
        (Request("the recipe", "processes", 2), 1, "single"),
        (Request("the recipe", "strategy", "zero3"), 2, "zero2"),
        (Request("the recipe", "strategy", "single"), 2, "ddp"),
        (Request("the launcher", "strategy", "fsdp"), 2, "ddp"),
        (Request("the launcher", "strategy", "zero"), 2, "ddp"),
        (Request("the launcher", "strategy", "zero2"), 2, "ddp"),
    ],
)
def test_each_downgrade_is_refused(wanted, processes, strategy):
    with pytest.raises(ConfigError, match=f"{wanted.who} asks for {wanted.what} `{wanted.wanted}`, but what runs is"):
        check_launch([wanted], processes, strategy)


def test_the_strategy_is_predicted(monkeypatch):
    gpu = torch.device("cuda")
    assert expected_strategy(arguments()) == "single"
    assert expected_strategy(arguments(world_size=2)) == "ddp"
    assert expected_strategy(arguments(world_size=2, fsdp="full_shard")) == "ddp"
    assert expected_strategy(arguments(world_size=2, fsdp="full_shard", device=gpu)) == "fsdp"
    assert expected_strategy(arguments(world_size=2, deepspeed_plugin=plugin(2))) == "zero2"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert expected_strategy(arguments(world_size=2, deepspeed_plugin=plugin(2))) == "ddp"


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
HOST = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}


MORE_OF_ZERO = {
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "OlmoeSparseMoeBlock",
    "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",  # as it is without the option
}
NODES = {"GROUP_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "OlmoeDecoderLayer",
}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "python"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2"),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "torchrun --nproc_per_node 8 --nnodes 2"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"},
            "accelerate launch --num_processes 1 --mixed_precision no --cpu",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "8", **ZERO, **HOST},
            "accelerate launch --num_processes 8 --mixed_precision bf16 --use_deepspeed --zero_stage 3 "
            "--offload_optimizer_device cpu",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "8", **ZERO, **MORE_OF_ZERO},
            "accelerate launch --num_processes 8 --mixed_precision bf16 --use_deepspeed --zero_stage 3 "
            "--zero3_init_flag false --zero3_save_16bit_model true --deepspeed_moe_layer_cls_names OlmoeSparseMoeBlock "
            "--gradient_clipping 0.5",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", **ZERO, **NODES},
            "accelerate launch --num_processes 16 --mixed_precision bf16 --num_machines 2 --machine_rank 0 "
            "--main_process_ip 10.0.0.1 --main_process_port 29500 --use_deepspeed --zero_stage 3 "
            "--deepspeed_multinode_launcher standard",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "8", **FSDP},
            "accelerate launch --num_processes 8 --mixed_precision bf16 --dynamo_backend inductor --use_fsdp "
            "--fsdp_version 2 --fsdp_reshard_after_forward true --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
            "--fsdp_transformer_layer_cls_to_wrap OlmoeDecoderLayer",
        ),
    ],
)
def test_a_report_has_the_launcher_in_its_command(environment, words, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch_command() == words.split()
    if precision := environment.get("ACCELERATE_MIXED_PRECISION"):
        given = launch_command_parser().parse_args([*launch_command()[2:], "train.py"])
        assert given.mixed_precision == precision  # accelerate has the options


def test_a_recipe_names_known_strategies():
    with pytest.raises(ConfigError, match="did you mean `zero3`"):
        parse_settings(LaunchSection, {"strategy": "zero-3"}, "launch")
    with pytest.raises(ConfigError, match="at least 1"):
        LaunchSection(processes=0)


def test_the_callback_refuses_a_downgrade_too(tmp_path, monkeypatch):
    """In a user's own Trainer. On a CPU, accelerate drops FSDP."""
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(4, 8)]
    settings = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(symphonize(make_model()), settings, train_dataset=rows, callbacks=[SymphonyCallback()])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    try:
        with pytest.raises(ConfigError, match="asks for strategy `fsdp`, but what runs is `single`"):
            trainer.train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"
ACCELERATE = "accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no"
RECIPE = """
model: {config: {model_type: olmoe, hidden_size: 16, intermediate_size: 8, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2, norm_topk_prob: true}}
data: {path: TEXT, block_size: 16, vocab_size: 300}
train: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, disable_tqdm: true, save_strategy: "no",
  dataloader_pin_memory: false}
eval: {documents: 2}
output: {directory: RUN}
"""


def launch(tmp_path, launcher, *overrides, **environment):
    text = "\n".join(f"word{n} speaks of thing{n * 7 % 13} and place{n * 5 % 11}" for n in range(400))
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(text[number * 100 :])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("TEXT", str(tmp_path / "text")).replace("RUN", str(tmp_path / "run")))
    return subprocess.run(
        [sys.executable, "-m", *launcher.split(), "-m", "symphony_hf.train", str(recipe), *overrides],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "SYMPHONY_HF_CACHE": str(tmp_path / "cache"), **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "environment", "message"),
    [
        (f"{ACCELERATE} --cpu --num_processes 2", {}, "the recipe asks for processes `2`"),
        (f"{TORCHRUN}", {"ACCELERATE_USE_FSDP": "true"}, "the launcher asks for strategy `fsdp`"),
        (
            f"{ACCELERATE} --use_deepspeed --zero_stage 2 --num_processes 2",
            {"ACCELERATE_USE_CPU": "true"},
            "the launcher asks for strategy `zero2`",
        ),
    ],
)
def test_a_downgraded_launch_is_refused(launcher, environment, message, tmp_path):
    if "deepspeed" in launcher:
        pytest.importorskip("deepspeed")
    result = launch(tmp_path, launcher, "--launch.processes", "2", **environment)
    assert result.returncode != 0
    assert message in result.stderr, result.stderr[-3000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_launch_that_runs_as_requested(strategy, tmp_path):
    """ZeRO-3 also partitions a model that is built from a config."""
    launcher = TORCHRUN
    if strategy != "ddp":
        pytest.importorskip("deepspeed")
        launcher = f"{ACCELERATE} --use_deepspeed --zero_stage {strategy[-1]} --num_processes 2"
    result = launch(tmp_path, launcher, "--launch.processes", "2", "--launch.strategy", strategy)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["processes"], results["strategy"]) == (2, strategy)
