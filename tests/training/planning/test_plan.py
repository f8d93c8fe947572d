"""`symphony plan`: FLOPs, tokens, hours, largest micro-batch, the command and its errors."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from planned import make_recipe
from typer.testing import CliRunner

from symphony_hf import ConfigError, UnsupportedModelError
from symphony_hf.cli import app
from symphony_hf.conversion.inspection.counts import count_parts
from symphony_hf.conversion.inspection.parts import Part
from symphony_hf.recipe import load_recipe
from symphony_hf.training.arguments import training_arguments
from symphony_hf.training.planning.launches import Launch, read_launches
from symphony_hf.training.planning.meta_device import TILE_TOKENS, TILE_VOCABULARY, head_is_tiled
from symphony_hf.training.planning.plan import (
    MAX_MICRO_BATCH_SIZE,
    USABLE,
    Machine,
    accelerate_folder,
    find_max_micro_batch_size,
    plan_recipe,
)
from symphony_hf.training.planning.settings import GLUE_EXAMPLES, read_settings, sequences_of_data, sequences_of_run
from symphony_hf.training.planning.step import MetaStep, StepBytes, meta_model
from symphony_hf.training.planning.tables import parse_bytes

RECIPES = Path(__file__).parents[3] / "recipes"
QUICKSTART = RECIPES / "quickstart" / "config.yaml"
SINGLE = Launch("one", "single")
SMALL = Machine(5 * 10**7)  # so that few steps are counted


def multiplied_weights(recipe):
    """Return the active weights that a token is multiplied with: all except the embedding table and the norms."""
    model = meta_model(recipe)
    active = sum(part.active for part in count_parts(model) if part.part not in (Part.NORMS, Part.GRAPHS))
    return active - model.get_input_embeddings().weight.numel()


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_six_or_eight_a_weight_and_token(family, checkpointing):
    recipe = make_recipe(family, "middle", gradient_checkpointing=checkpointing)
    hidden, layers, tokens, vocabulary = 256, 4, 256, 4096
    flops = MetaStep(recipe, read_settings(recipe), None).flops()
    weights = multiplied_weights(recipe)
    # Forward two products of tokens by tokens by hidden, half of them masked; backward five.
    attention = layers * 2 * hidden * tokens**2
    expected = 6 * weights * tokens + (1 + 2.5) * attention
    if checkpointing:  # the layers again, but for the head, and what comes last in a dense layer
        not_again = hidden * vocabulary + (2 * hidden * 512 if family == "qwen2_moe" else 0)
        expected += 2 * (weights - not_again) * tokens + attention
    assert flops == pytest.approx(expected, rel=0.01)  # the graphs' own products are the rest


@pytest.mark.thorough
def test_frozen_weights_cost_four():
    recipe, full = make_recipe("olmoe", "middle", lora=True), make_recipe("olmoe", "middle")
    settings = read_settings(full)
    lora = MetaStep(recipe, settings, None).flops()
    assert 4 / 6 < lora / MetaStep(full, settings, None).flops() < 4.8 / 6  # adapters, and attention's own products


@pytest.mark.thorough
def test_deepspeed_casts_the_model_and_autocast_does_not():
    recipe = make_recipe("olmoe", "middle", bf16=True)
    settings = read_settings(recipe)
    assert settings.half is torch.bfloat16
    plain, autocast, cast = (
        MetaStep(recipe, settings, half, whole).bytes(4).activations
        for half, whole in ((None, False), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    assert cast < autocast
    assert cast < 0.75 * plain


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_convex_in_the_micro_batch_size(checkpointing):
    recipe = make_recipe("olmoe", "middle", gradient_checkpointing=checkpointing)
    step = MetaStep(recipe, read_settings(recipe), None)
    one, two, four = (step.bytes(sequences) for sequences in (1, 2, 4))
    for name in ("activations", "with_gradients"):
        low, middle, high = (getattr(count, name) for count in (one, two, four))
        assert low < middle < high
        assert (high - middle) / 2 >= 0.999 * (middle - low)  # which the search between powers of two relies on


def test_the_tiles_of_conversations_are_trls():
    trl = pytest.importorskip("trl.trainer.utils")
    if not head_is_tiled():
        pytest.skip("this TRL makes all logits")
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

    assert (TOKEN_CHUNK_SIZE, trl._CHUNKED_LOGPROB_CHUNK_SIZE) == (TILE_TOKENS, TILE_VOCABULARY)


@pytest.mark.thorough
def test_conversations_are_counted_without_all_logits():
    pytest.importorskip("trl")
    if not head_is_tiled():
        pytest.skip("this TRL makes all logits")
    smoke = RECIPES / "olmoe-7b-sft" / "smoke.yaml"
    config = {**load_recipe(smoke).model.config, "vocab_size": 50304}
    chat = load_recipe(smoke, {"model.config": config})
    text = load_recipe(smoke, {"model.config": config, "data.kind": "text"})
    kept = [MetaStep(recipe, read_settings(recipe), None).bytes(32).activations for recipe in (chat, text)]
    logits = 4 * 32 * 128 * 50304
    assert kept[1] > 2 * logits  # them, and their gradient
    assert kept[0] < logits
    smoothed = dataclasses.replace(chat, train={**chat.train, "label_smoothing_factor": 0.1})
    assert MetaStep(smoothed, read_settings(smoothed), None).bytes(32).activations > 2 * logits
    trained = [dataclasses.replace(recipe, peft=None) for recipe in (chat, text)]
    flops = [MetaStep(recipe, read_settings(recipe), None).flops() for recipe in trained]
    assert flops[0] - flops[1] == pytest.approx(2 * 128 * 32 * 50304, rel=0.001)  # the logits once more


@pytest.mark.parametrize(
    ("per_sequence", "room", "expected"), [(10, 5, 0), (10, 10, 1), (10, 79, 7), (10, 10**9, None)]
)
def test_the_largest_micro_batch(per_sequence, room, expected):
    counted = []

    def count(sequences):
        counted.append(sequences)
        return StepBytes(per_sequence * sequences, 0)

    found = find_max_micro_batch_size(count, lambda step: step.activations <= room)
    assert found == (MAX_MICRO_BATCH_SIZE if expected is None else expected)
    assert all(sequences.bit_count() == 1 for sequences in counted)


@pytest.mark.thorough
def test_the_largest_micro_batch_fits_and_the_next_does_not():
    recipe = make_recipe("olmoe", "middle", max_steps=10)
    machine = Machine(10**9)
    (row,) = plan_recipe(recipe, [SINGLE], [1], machine).rows
    states = row.memory.gpu_total - row.memory.gpu["activations"]
    step = MetaStep(recipe, read_settings(recipe), None)
    gradients = row.memory.gpu["gradients"]

    def total(sequences):
        return states + step.bytes(sequences).with_gradients - gradients

    assert total(row.max_micro_batch_size) <= USABLE * machine.gpu_memory
    # A straight line between powers of two may be a little too careful.
    assert total(row.max_micro_batch_size + 2) > USABLE * machine.gpu_memory


@pytest.mark.thorough
def test_tokens_and_hours():
    smoke = RECIPES / "phi3-smoe-7.4b-glue" / "smoke.yaml"
    recipe = load_recipe(smoke, {"data.path": None, "data.limit": None, "max_steps": -1})
    launches = [launch for launch in read_launches(accelerate_folder(QUICKSTART)) if launch.name == "zero3"]
    plan = plan_recipe(recipe, launches, [8], Machine(5 * 10**7, gpu_flops=1e15, utilization=0.5))
    (row,) = plan.rows
    assert row.sequences == 3 * GLUE_EXAMPLES["qnli"]
    assert row.hours == pytest.approx(row.sequences * plan.flops_per_sequence / (8 * 0.5e15) / 3600)
    assert sequences_of_run(read_settings(load_recipe(QUICKSTART)), 8, None) == 300 * 16 * 8  # by steps


@pytest.mark.slow
def test_local_data_is_counted():
    smoke = load_recipe(RECIPES / "phi3-smoe-7.4b-glue" / "smoke.yaml", {"max_steps": -1})
    assert sequences_of_data(smoke) == 16  # the recipe's limit


def test_remote_data_needs_sequences():
    recipe = load_recipe(QUICKSTART, {"max_steps": -1, "num_train_epochs": 2, "data.path": "nobody/nothing"})
    assert sequences_of_data(recipe) is None
    settings = read_settings(recipe)
    assert sequences_of_run(settings, 8, None) is None
    assert sequences_of_run(settings, 8, 50) == 100


@pytest.mark.thorough
def test_every_launch_of_the_recipes_is_planned():
    plan = plan_recipe(load_recipe(QUICKSTART), read_launches(accelerate_folder(QUICKSTART)), [1, 8], SMALL)
    found = {(row.launch.name, row.processes) for row in plan.rows}
    several = ("ddp", "zero2", "zero3", "zero3_offload")
    expected = {(name, count) for name in several for count in (1, 8)}
    expected |= {("single_gpu", 1), ("cpu", 1), ("zero3_two_nodes", 2), ("zero3_two_nodes", 16)}
    assert found == expected
    on_cpu = next(row for row in plan.rows if row.launch.name == "cpu")
    assert on_cpu.memory.gpu == {}
    assert on_cpu.max_micro_batch_size is on_cpu.hours is None


@pytest.mark.thorough
def test_launches_that_the_runner_refuses_are_left_out():
    launches = read_launches(accelerate_folder(QUICKSTART))
    recipe = load_recipe(QUICKSTART, {"launch.strategy": "zero2"})
    plan = plan_recipe(recipe, launches, [2], SMALL)
    assert {row.launch.name for row in plan.rows} == {"zero2"}
    assert plan.left_out["ddp"] == "the recipe's `launch` section asks for zero2"
    with pytest.raises(ConfigError, match=r"runs under none of the launches.*asks for zero2"):
        plan_recipe(recipe, [SINGLE], [1], SMALL)


@pytest.mark.thorough
def test_launches_that_round_steps_away_are_named():
    """DeepSpeed keeps float32 copies. Adapters are float32, and in mixed precision their routers are too."""

    def found(lora, **train):
        recipe = make_recipe(lora=lora, max_steps=1, **train)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="bfloat16"))
        return plan_recipe(recipe, [SINGLE, Launch("two", "zero2")], [1], Machine(1)).rounding

    assert found(lora=False, bf16=True) == ("one",)
    assert found(lora=True, bf16=True) == ()
    assert found(lora=True) == ("one",)
    recipe = RECIPES / "phi3-smoe-7.4b-glue" / "smoke.yaml"
    result = run(recipe, "--model.dtype", "bfloat16", "--gpus", "1", "--gpu_memory", "1GB")
    assert "single_gpu, ddp, cpu: weights would be trained in 16 bits" in " ".join(result.output.split())


@pytest.mark.thorough
def test_numbers_of_processes_that_the_runner_refuses_are_left_out():
    recipe = load_recipe(QUICKSTART, {"launch.processes": 4})
    plan = plan_recipe(recipe, [SINGLE, Launch("many", "ddp"), Launch("two", "ddp", machines=2)], [1, 2, 4, 8], SMALL)
    assert [(row.launch.name, row.processes) for row in plan.rows] == [("many", 4), ("two", 4)]
    assert plan.left_out == {"one": "the recipe's `launch` section asks for 4 processes"}
    with pytest.raises(ConfigError, match=r"runs under none of the launches.*asks for 4 processes"):
        plan_recipe(recipe, [SINGLE], [4], SMALL)


def test_numbers_are_read_as_training_reads_them():
    settings = read_settings(load_recipe(QUICKSTART, {"max_steps": "1e3", "num_train_epochs": "2"}))
    assert (settings.max_steps, settings.epochs) == (1000, 2)
    assert training_arguments(load_recipe(QUICKSTART, {"max_steps": "1e3", "use_cpu": True})).max_steps == 1000


def test_a_recipe_elsewhere_needs_launches(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: {QUICKSTART}\n")
    result = run(tmp_path / "mine.yaml")
    assert isinstance(result.exception, ConfigError)
    assert "give one, or a folder of them, by --accelerate" in str(result.exception)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.mark.thorough
def test_the_command_prints_tables_and_writes_a_json(tmp_path):
    output = tmp_path / "plan.json"
    result = run(
        QUICKSTART, "--gpus", "1,8", "--gpu_memory", "50MB", "--json", output, "--per_device_train_batch_size", "4"
    )
    assert result.exit_code == 0, result.output
    for word in ("zero3_two_nodes", "activ.", "buffers", "micro-batch 4 x 128 tokens", "hours"):
        assert word in " ".join(result.output.split())
    assert "…" not in result.output  # 80 characters are enough
    written = json.loads(output.read_text())
    assert written["settings"]["micro_batch"] == 4
    assert written["machine"]["gpu_memory"] == 5 * 10**7
    for row in written["rows"]:
        for device in ("gpu_bytes", "host_bytes"):
            parts = {name: size for name, size in row[device].items() if name not in ("total", "loading")}
            assert row[device]["total"] == max(sum(parts.values()), row[device].get("loading", 0))


BAD = {
    "no GPU": ((QUICKSTART, "--gpus", "0"), "`0` is no number of GPUs"),
    "no number": ((QUICKSTART, "--gpus", "1,many"), "`many` is no number of GPUs"),
    "no size": ((QUICKSTART, "--gpu_memory", "lots"), "`lots` is not a size"),
    "no unit": ((QUICKSTART, "--gpu_memory", "80"), "`80` is not a size"),
    "too good": ((QUICKSTART, "--utilization", "1.5"), "`utilization` must be above 0 and at most 1"),
    "no peak": ((QUICKSTART, "--gpu_flops", "0"), "`gpu_flops` must be above 0"),
    "no sequence": ((QUICKSTART, "--sequences", "0"), "must be at least 1, got 0"),
    "a number of steps": ((QUICKSTART, "--sequences", "5"), "with `max_steps: 300`, `sequences` has no effect"),
    "no recipe": (("nowhere.yaml",), "recipe `nowhere.yaml`: No such file"),
    "no setting": ((QUICKSTART, "--per_device_train_batchsize", "4"), "did you mean `per_device_train_batch_size`"),
    "no batch": (
        (QUICKSTART, "--per_device_train_batch_size", "0"),
        "`per_device_train_batch_size` must be at least 1, got 0",
    ),
    "no number of steps": ((QUICKSTART, "--max_steps", "abc"), "`max_steps` must be int, got 'abc'"),
    "null steps": ((QUICKSTART, "--max_steps", "null"), "`max_steps` must be int, got None"),
    "no number of epochs": ((QUICKSTART, "--num_train_epochs", "two"), "`num_train_epochs` must be float, got 'two'"),
    "offloading": (
        (QUICKSTART, "--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"offload": true}'),
        "`offload: True` cannot be planned",
    ),
    "no layers": (
        (QUICKSTART, "--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", "{every_n_layers: 0}"),
        "integer of at least 1, got 0",
    ),
    "no config": ((QUICKSTART, "--model.path", "nobody/nothing", "--model.config", "null"), "could not be loaded"),
    "a folder for the JSON": ((QUICKSTART, "--json", RECIPES), "is a folder, and the result is a file"),
    "no launches": ((QUICKSTART, "--accelerate", RECIPES / "evidence"), "no accelerate configuration"),
    "no launch": ((QUICKSTART, "--accelerate", QUICKSTART), "it has no `distributed_type`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    arguments, message = BAD[name]
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_other_launches_are_refused(tmp_path):
    path = tmp_path / "fsdp.yaml"
    path.write_text("distributed_type: FSDP\nmixed_precision: bf16\n")
    with pytest.raises(ConfigError, match="`FSDP` cannot be planned"):
        read_launches(path)
    path.write_text("distributed_type: MULTI_GPU\nmixed_precision: fp8\n")
    with pytest.raises(ConfigError, match="mixed_precision `fp8` cannot be planned"):
        read_launches(path)


@pytest.mark.parametrize("written", ["null", "no", '"no"'])
def test_a_launch_without_mixed_precision(written, tmp_path):
    path = tmp_path / "ddp.yaml"
    path.write_text(f"distributed_type: MULTI_GPU\nmixed_precision: {written}\n")
    assert read_launches(path)[0].half is None


@pytest.mark.parametrize("experts", ["eager", "deepgemm"])
def test_a_model_whose_step_depends_on_values_or_a_gpu_is_refused(experts):
    """Eager experts look for those that were chosen."""
    recipe = make_recipe()
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, experts=experts))
    step = MetaStep(recipe, read_settings(recipe), None)
    with pytest.raises(UnsupportedModelError, match="a step of OlmoeForCausalLM cannot be measured on the meta device"):
        step.bytes(1)


def test_nothing_is_trained():
    recipe = load_recipe(QUICKSTART, {"model.trainable": []})
    with pytest.raises(ConfigError, match="nothing is trained"):
        plan_recipe(recipe, [SINGLE], [1], SMALL)


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("79.6 gib", round(79.6 * 2**30)), ("1TB", 10**12)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.thorough
def test_images_are_planned():
    recipe = load_recipe(RECIPES / "llava-smoe-4.2b" / "smoke.yaml")
    plan = plan_recipe(recipe, [SINGLE], [1], SMALL)
    assert plan.rows[0].memory.gpu["activations"] > 0
    assert plan.states.num_trained < plan.states.total  # the part of the tower that nothing reads


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["phi3-smoe-7.4b-glue/config", "phi3-smoe-7.4b-sft/config", "olmoe-7b-sft/full", "mixtral-8x7b-qlora/config"],
)
def test_the_recipes_are_planned_at_their_true_size(name):
    path = RECIPES / f"{name}.yaml"
    plan = plan_recipe(
        load_recipe(path), read_launches(accelerate_folder(path)), [8], Machine(80 * 10**9), sequences=1000
    )
    assert all(row.max_micro_batch_size for row in plan.rows if row.launch.on_gpu)
