"""quantize_experts: packed while loading or in place; every way of running it; trained on; never saved."""

import copy
import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import models
import pytest
import torch
from models import CONFIGS, make_ids, move_graphs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from symphony_hf import (
    ConfigError,
    DataError,
    PatchError,
    SymphonyCallback,
    SymphonyWarning,
    UnsupportedModelError,
    expert_graphs,
    export_folded,
    inspect_model,
    load_adapter,
    lora_config,
    quantize_experts,
    symphonize,
    update_graphs,
)
from symphony_hf.conversion.inspection.counts import held_types
from symphony_hf.conversion.inspection.parts import Part
from symphony_hf.conversion.inspection.tensors import held_tensors
from symphony_hf.conversion.quantization.estimate import plan_bytes
from symphony_hf.conversion.quantization.packing import Packing
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.experiments.conformance.specimen import Specimen
from symphony_hf.experiments.conformance.tiny import (
    auto_class_of,
    moe_families,
    tiny_config,
    tiny_model,
    why_not_built,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
# The data type's 16 numbers, with equal shares of a normal distribution between them, scaled to [-1, 1].
NF4 = [
    -1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _peft_and_transformers_of_each_other():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def make_model(family="olmoe", **settings):
    """Build a model with rows of 64 values: bitsandbytes unpacks others wrongly on a CPU."""
    return models.make_model(family, **{**SIZES, **settings})


def naive_nf4(weight, blocksize=64):
    """Round each block of 64 numbers, over its largest, to the nearest of the 16 values, in plain PyTorch."""
    codes = torch.tensor(NF4)
    blocks = weight.float().reshape(-1, blocksize)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scales).unsqueeze(-1).sub(codes).abs().argmin(-1)
    return (codes[nearest] * scales).reshape(weight.shape)


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(input_ids=make_ids() if ids is None else ids).logits


def stacked(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}


# What is packed.


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_is_what_nf4_says(double_quant):
    model = make_model("mixtral")
    whole = {name: weight.detach().clone() for name, weight in stacked(model).items()}
    assert quantize_experts(model, double_quant=double_quant) is model
    for name, weight in whole.items():
        got = model.get_submodule(name.rpartition(".")[0])
        got = getattr(got, name.rpartition(".")[2])
        assert got.shape == weight.shape
        # The scales of double quantization are themselves of 8 bits, within 1/127 of the largest of 256 of them.
        torch.testing.assert_close(got, naive_nf4(weight), rtol=0.02 if double_quant else 1e-5, atol=1e-3)
        # Normal numbers in 4 bits: 9% off, by their norms.
        assert 0.05 < (got - weight).norm() / weight.norm() < 0.12
    assert not any(p.requires_grad for n, p in model.named_parameters() if "parametrizations" in n)
    assert sum("parametrizations" in name for name, _ in model.named_parameters()) == len(whole) == 6


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_packing_by_experts_is_bitsandbytes_own(quant_type, double_quant):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model, reference = make_model("mixtral"), make_model("mixtral")
    quantize_experts(model, quant_type=quant_type, double_quant=double_quant)
    for name in stacked(reference):
        path, _, parameter = name.rpartition(".")
        module = reference.get_submodule(path)
        replace_parameter_4bit(module, parameter, compress_statistics=double_quant, quant_type=quant_type)
    state, expected = model.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        # Of the scales' mean, added up in another order, one rounding may be another.
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_experts_follow_the_model_to_another_device(double_quant):
    model = quantize_experts(make_model("mixtral"), double_quant=double_quant)
    states = [held.quant_state for held in held_tensors(model) if held.quant_state is not None]
    assert len(states) == 6
    model.to(torch.bfloat16)
    assert {state.absmax.dtype for state in states} == {torch.uint8 if double_quant else torch.float32}
    model.to("meta")
    parts = [part for state in states for part in (state, state.state2) if part is not None]
    tensors = [tensor for part in parts for tensor in (part.absmax, part.code, part.offset) if tensor is not None]
    assert len(tensors) == 6 * (5 if double_quant else 2)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_size_is_counted_by_hand():
    """It is 4 bits per number, and a byte per block of 64 for its scale, whose own constants are few."""
    model = make_model("mixtral", hidden_size=256, intermediate_size=256)
    before = inspect_model(model)
    numbers = next(part.total for part in before.parts if part.part is Part.EXPERTS)
    quantize_experts(model)
    types = {count.type: count for count in held_types(model)}
    assert types["nf4"].parameters == numbers
    packed = numbers // 2 + numbers // 64
    # The scales' scales, one float32 for 256 of them, and for each weight two tables, of 16 and of 256 numbers.
    constants = 4 * numbers // 64 // 256 + 6 * (16 + 256 + 1) * 4
    assert types["nf4"].bytes == packed + constants
    assert types["float32"].parameters == before.total - numbers
    after = inspect_model(model)
    assert (after.total, after.active) == (before.total, before.active)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("form", ["plain", "symphony"])
def test_loading_packs_what_packing_in_place_does(tmp_path, family, form):
    model = make_model(family)
    if form == "symphony":
        move_graphs(symphonize(model))
    model.save_pretrained(tmp_path)
    loaded = quantize_experts(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(quantize_experts(model)))
    if form == "symphony":
        graphs = expert_graphs(loaded)
        assert all(torch.equal(graphs[name], graph) for name, graph in expert_graphs(model).items())
    # Nobody takes it for a quantized model: the linear maps, and so what PEFT and Trainer look at, are plain.
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "quantization_config")
    assert not hasattr(loaded.config, "_is_quantized")


def test_a_model_that_its_auto_class_loads(tmp_path, monkeypatch):
    monkeypatch.setitem(models.COMMON, "hidden_size", 64)
    monkeypatch.setitem(models.COMMON, "intermediate_size", 64)
    model = models.make_llava()
    model.save_pretrained(tmp_path)
    for model_class in (None, AutoModelForImageTextToText):
        loaded = quantize_experts(tmp_path, model_class=model_class, dtype=torch.bfloat16)
        assert type(loaded) is type(model)
        assert loaded.dtype == torch.bfloat16
        assert {count.type for count in held_types(loaded)} == {"nf4", "bfloat16"}


@pytest.mark.parametrize("family", ["mixtral", "afmoe"])
def test_with_linear_maps_in_4_bits_in_the_same_load(tmp_path, family):
    """Routers are not quantized, even where bitsandbytes' own load would: AFMoE's router is an nn.Linear."""
    import bitsandbytes as bnb

    config = tiny_config(family)
    config.update({"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded = quantize_experts(tmp_path, quantization_config=config)
    linears = {name for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    plain = {name for name, module in loaded.named_modules() if type(module) is torch.nn.Linear}
    assert any("self_attn.q_proj" in name for name in linears)
    assert "lm_head" in plain
    assert not any(".router." in name for name in linears)
    assert any(".router." in name for name in plain) == (family == "afmoe")
    assert loaded.is_loaded_in_4bit
    assert loaded.config.quantization_config.quant_method == "bitsandbytes"
    assert json.loads(loaded.config.to_json_string())["quantization_config"]["load_in_4bit"]
    assert config.llm_int8_skip_modules is None  # the user's own is as it was
    assert {count.type for count in held_types(loaded)} == {"nf4", "fp4", "float32"}
    symphonize(loaded)
    in_place = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=copy.deepcopy(loaded.config.quantization_config)
    )
    ids = make_ids()
    assert torch.equal(logits(loaded, ids), logits(symphonize(quantize_experts(in_place)), ids))


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in moe_families() if why_not_built(f) is None])
def test_every_family(tmp_path, family, monkeypatch):
    """Packing while loading and in place agree, and the model trains with graphs; or it is refused with the cause.

    Their rows are shorter than a block, and so unpacked wrongly, but always in the same way.
    """
    for name in ("loading", "quantize_experts"):
        module = importlib.import_module(f"symphony_hf.conversion.quantization.{name}")
        monkeypatch.setattr(module, "check_rows", lambda experts: None)
    with quiet():
        specimen = Specimen(family)
        if family in ("dbrx", "nllb-moe", "switch_transformers", "doge", "diffusion_gemma"):
            if family not in ("doge", "diffusion_gemma"):
                with pytest.raises(UnsupportedModelError, match=r"linear maps of its own|not stacked"):
                    quantize_experts(copy.deepcopy(specimen.base))
            return
        specimen.base.save_pretrained(tmp_path)
        loaded = quantize_experts(tmp_path, model_class=auto_class_of(family))
        before = specimen.logits(loaded)
        assert torch.equal(before, specimen.logits(quantize_experts(copy.deepcopy(specimen.base))))
        assert torch.equal(specimen.logits(symphonize(loaded)), before)
        import peft

        warnings.filterwarnings("ignore", ".*get no LoRA", SymphonyWarning)  # until `quiet` ends
        adapted = peft.get_peft_model(loaded, lora_config(loaded, router="train", r=2))
        outputs = specimen.training_outputs(adapted)
        loss = getattr(outputs, "loss", None)
        (outputs.logits.float().square().mean() if loss is None else loss).backward()
        assert any(p.grad is not None for n, p in adapted.named_parameters() if "modules_to_save" in n)


# How it runs.


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation(experts):
    """The reference is the same model whose experts hold the unpacked numbers as plain weights."""
    packed = quantize_experts(make_model(experts=experts))
    reference = make_model(experts=experts)
    for name, weight in stacked(reference).items():
        path, _, parameter = name.rpartition(".")
        weight.data = getattr(packed.get_submodule(path), parameter).clone()
    assert torch.equal(logits(packed), logits(reference))
    # The experts' outputs are some 15% off, of which the residual stream has a part.
    error = (logits(packed) - logits(make_model(experts=experts))).norm() / logits(reference).norm()
    assert 0 < error < 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(experts, use_reentrant):
    import peft

    def run(checkpointed):
        model = symphonize(quantize_experts(make_model(experts=experts)), decay=0.5, z_loss_weight=0.1)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, lora_config(model, router="train", r=4, init_lora_weights=False)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        ids = make_ids()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert update_graphs(adapted)
        gradients = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None and "embed" not in n}
        return gradients, expert_graphs(adapted)

    (plain, graphs), (recomputed, again) = run(False), run(True)
    assert any("modules_to_save" in name for name in plain)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(again[name], graph) for name, graph in graphs.items())
    assert torch.nn.utils.parametrize._cache_enabled == 0  # nothing unpacked is kept


@pytest.mark.thorough
@pytest.mark.parametrize("linears", [False, True])
def test_lora_with_router_and_graph_learns(tmp_path, linears):
    """Train 50 steps on a few sentences; the adapter on a base that is packed anew is bitwise the same."""
    import peft

    make_model("mixtral").save_pretrained(tmp_path / "base")
    settings = {}
    if linears:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        settings = {"quantization_config": config}
    model = symphonize(quantize_experts(tmp_path / "base", **settings), decay=0.9)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora_config(model, router="train", r=8)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    ids, losses = make_ids(2, 8), []
    start, routers = expert_graphs(adapted), [p.detach().clone() for p in trained]
    update_graphs(adapted)
    for _ in range(50):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_graphs(adapted)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]  # embeddings and head are frozen, and random: it ends above 3
    assert losses[10] > losses[30] > losses[-1]
    assert all(not torch.equal(graph, start[name]) for name, graph in expert_graphs(adapted).items())
    assert all(not torch.equal(now, before) for now, before in zip(trained, routers, strict=True))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(quantize_experts(tmp_path / "base", **settings), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(adapted))
    # Merged into the base in 16 bits (here 32), it predicts them, too.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = load_adapter(base, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        assert float(merged(input_ids=ids, labels=ids).loss) < 0.8 * losses[0]


def test_peft_cannot_train_lora_on_packed_experts():
    """This is why it is refused. If a release of PEFT passes this, `lora_config` should allow it."""
    import peft

    model = quantize_experts(make_model())
    names = [f"model.layers.{n}.mlp.experts.{w}" for n in range(3) for w in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    ids = make_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(input_ids=ids, labels=ids).loss.backward()
        idle = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        assert len(idle) == 6  # one of the two weights of each layer
        with pytest.raises(RuntimeError, match="can require gradients"):
            adapted(input_ids=ids, labels=ids)
    with pytest.raises(ConfigError, match=r"packed in 4 bits.*0\.21\.2.*experts=False"):
        lora_config(symphonize(quantize_experts(make_model())), experts=True)


def test_trainer_trains_it(tmp_path):
    import peft
    from transformers import Trainer, TrainingArguments

    model = symphonize(quantize_experts(make_model()))
    adapted = peft.get_peft_model(model, lora_config(model, router="train", r=4))
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 8)]
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
        max_steps=2,
        save_steps=2,
        gradient_checkpointing=True,
    )
    Trainer(adapted, arguments, train_dataset=rows, callbacks=[SymphonyCallback()]).train()
    loaded = load_adapter(quantize_experts(make_model()), tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_recipe_asks_for_it(tmp_path):
    """The recipe packs linear layers too, and trains LoRA, as the Mixtral recipe does."""
    import bitsandbytes as bnb

    from symphony_hf.recipe import load_recipe
    from symphony_hf.training.models import add_adapters, add_graph, load_model

    make_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{path: {tmp_path / 'base'}, quantization: nf4}}\npeft: {{r: 4}}\nsymphony: {{}}\n")
    recipe = load_recipe(file)
    model = load_model(recipe, None)
    add_graph(model, recipe)
    adapted = add_adapters(model, recipe.peft)
    assert sum("parametrizations" in name for name, _ in adapted.named_parameters()) == 6
    linear = model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(linear, bnb.nn.Linear4bit)
    assert linear.compute_dtype == torch.bfloat16
    assert logits(adapted).isfinite().all()


# What it takes.

_PEAK = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from symphony_hf import quantize_experts
from transformers import AutoModelForCausalLM
import bitsandbytes, torch
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
model = {load}
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_the_peak_is_never_the_model_in_16_bits(tmp_path):
    """A model of 0.4 GiB in bfloat16 is loaded in its own processes, plain and packed, not counting mapped files."""
    shapes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_hidden_layers": 16}
    model = make_model("mixtral", dtype=torch.bfloat16, **shapes)
    size = sum(parameter.nbytes for parameter in model.parameters())
    one_layer = sum(parameter.nbytes for parameter in model.model.layers[0].mlp.experts.parameters())
    model.save_pretrained(tmp_path)
    del model
    assert size > 0.35 * 2**30

    def peak(load):
        code = _PEAK.format(tests=str(Path(__file__).parents[1] / "helpers"), load=load)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split()[-1])

    plain = peak(f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.bfloat16)")
    packed = peak(f"quantize_experts({str(tmp_path)!r}, dtype=torch.bfloat16)")
    assert plain > 0.9 * size
    # What is packed, a layer being read, stacked and packed, and the memory that the allocator does not give back.
    assert packed < 0.3 * size + 6 * one_layer
    assert packed < 0.7 * size


def test_a_plan_counts_what_packing_gives():
    model = make_model("mixtral")
    plan = plan_bytes(model, dtype=torch.float32)
    assert plan.plain_bytes == sum(parameter.nbytes for parameter in model.parameters())
    packed = quantize_experts(model)
    assert plan.packed_bytes("experts") == sum(count.bytes for count in held_types(packed))
    assert plan.packed_bytes() == plan.plain_bytes
    values = plan.to_dict()
    assert values["parameters"] == plan.parameters
    assert values["bytes"]["experts and linear maps in 4 bits"] < values["bytes"]["experts in 4 bits"]
    assert {row["kind"]: row["count"] for row in values["measured"] if row["kind"] == "experts"} == {"experts": 3}
    assert json.loads(json.dumps(values)) == values


def test_a_plan_of_a_symphony_model_on_the_meta_device():
    with torch.device("meta"):
        model = make_model("olmoe")
    plan = plan_bytes(symphonize(model))
    assert plan.plain_bytes == 2 * (plan.parameters - 3 * 64) + 4 * 3 * 64


@pytest.mark.parametrize(("name", "total"), [("olmoe-7b-sft", 6_919_161_856), ("mixtral-8x7b-qlora", 46_702_792_704)])
def test_the_recorded_plans_add_up(name, total):
    """A number takes 0.516 bytes: 4 bits, and a byte per 64 of them."""
    plan = json.loads((Path(__file__).parents[2] / "recipes" / name / "bytes_4bit.json").read_text())
    assert total <= plan["parameters"] <= total + 32 * 64 * 64  # with the graphs
    experts = [row for row in plan["measured"] if row["kind"] == "experts"]
    numbers = sum(row["count"] * row["bfloat16 bytes"] for row in experts) // 2
    packed = sum(row["count"] * row["4-bit bytes"] for row in experts)
    assert packed == pytest.approx(0.516 * numbers, rel=2e-3)
    assert plan["bytes"]["experts in 4 bits"] == plan["bytes"]["bfloat16"] - 2 * numbers + packed


# What is refused.


def test_it_cannot_be_saved_but_its_adapter_can(tmp_path, native_adapters):
    import peft

    packed = quantize_experts(make_model())
    for model in (packed, symphonize(packed), copy.deepcopy(packed)):
        with pytest.raises(PatchError, match=r"packed in 4 bits.*save the adapter.*merge_and_unload"):
            model.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="packed in 4 bits"):
        export_folded(packed, tmp_path / "folded")
    with pytest.raises(PatchError, match="16 bits"):
        packed.dequantize()
    assert not list(tmp_path.rglob("*.safetensors"))
    native = symphonize(quantize_experts(make_model()))
    native.add_adapter(lora_config(native))
    native.save_pretrained(tmp_path / "native")  # of transformers' own integration of PEFT
    assert (tmp_path / "native" / "adapter_model.safetensors").exists()
    peft.get_peft_model(packed, lora_config(packed)).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "symphony_config.json").exists()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernel for AVX-512 is wrong")
def test_bitsandbytes_unpacks_partial_blocks_wrongly_with_avx512():
    """This is why such rows are refused. If a release of bitsandbytes unpacks them correctly, remove the refusal."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(2, 32, 96)
    unpacked = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    assert not torch.allclose(unpacked, naive_nf4(weight), rtol=1e-3, atol=1e-3)


def test_rows_that_end_within_a_block_are_refused(tmp_path):
    """They are refused on every processor, so that a packed model computes the same on each."""
    model = make_model("mixtral", intermediate_size=96)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"down_proj` has rows of 96 values.*accelerator"):
        quantize_experts(model)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="rows of 96"):
        quantize_experts(tmp_path)


def test_what_is_packed_already():
    model = quantize_experts(make_model())
    with pytest.raises(PatchError, match="packed in 4 bits already"):
        quantize_experts(model)


def test_what_has_nothing_to_pack(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"linear maps of its own.*BitsAndBytesConfig"):
        quantize_experts(tiny_model("switch_transformers"))
    with pytest.raises(UnsupportedModelError, match=r"not stacked.*\(192, 32\)"):
        quantize_experts(tiny_model("dbrx"))
    dense = AutoModelForCausalLM.from_config(make_llama_config())
    with pytest.raises(UnsupportedModelError, match="no experts"):
        quantize_experts(dense)
    dense.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no experts"):
        quantize_experts(tmp_path)


def make_llama_config():
    import transformers
    from models import COMMON

    return transformers.LlamaConfig(**COMMON)


def test_what_is_not_to_be_had_as_numbers(native_adapters):
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(PatchError, match="the checkpoint's path"):
        quantize_experts(model)
    adapted = symphonize(make_model())
    adapted.add_adapter(lora_config(adapted))
    with pytest.raises(PatchError, match="adapters"):
        quantize_experts(adapted)
    with pytest.raises(PatchError, match="unwrap"):
        quantize_experts(torch.nn.Sequential(make_model()))


def test_settings_that_are_not_known(tmp_path):
    with pytest.raises(ConfigError, match="did you mean `nf4`"):
        quantize_experts(make_model(), quant_type="nf3")
    with pytest.raises(ConfigError, match=r"dtype.*a loaded model was given"):
        quantize_experts(make_model(), dtype=torch.bfloat16)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="load_in_4bit=True"):
        quantize_experts(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ConfigError, match="no config"):
        quantize_experts(tmp_path / "nothing")


def test_a_checkpoint_in_a_subfolder(tmp_path):
    make_model().save_pretrained(tmp_path / "inner")
    packed = quantize_experts(tmp_path, subfolder="inner", local_files_only=True)
    assert len(packed.hf_quantizer.expert_names) == 2 * packed.config.num_hidden_layers


def test_a_checkpoint_that_is_quantized_already(tmp_path):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ConfigError, match=r"quantized already.*16 bits"):
        quantize_experts(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_some_experts(tmp_path):
    make_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks 1 of 6.*layers\.1\.mlp\.experts\.down_proj"):
        quantize_experts(tmp_path)
    weights[name] = weights[name][:, :, :4].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises((DataError, RuntimeError), match=r"shape|conversion|lacks"):
        quantize_experts(tmp_path)


def test_bitsandbytes_that_is_missing_or_old(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.48.0")
    with pytest.raises(ConfigError, match=r">=0\.49, and 0\.48\.0 is installed"):
        quantize_experts(make_model())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'symphony-hf\[bitsandbytes\]'"):
        quantize_experts(make_model())


def test_packing_is_data():
    assert Packing() == Packing("nf4", True)
