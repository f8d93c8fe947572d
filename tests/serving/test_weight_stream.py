"""Folding while a checkpoint's tensors pass by: the result is `export_folded`'s, in any order, or a refusal."""

import copy
import random

import pytest
import torch
from models import make_model, move_graphs
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from symphony_hf import ConfigError, FoldError, GraphError, expert_graphs, export_folded, symphonize
from symphony_hf.checkpoints.graph_files import SUFFIX
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.families.discovery import layer_number
from symphony_hf.serving.router_names import ROUTERS
from symphony_hf.serving.weight_stream import WeightStream

pytestmark = pytest.mark.filterwarnings("ignore:export_folded. ")  # settings that an engine takes differently
MODEL_TYPES = {name: model_type for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def written(model, folder):
    """Save a model both ways. Returns its config, its tensors, and those of its folded form."""
    model.save_pretrained(folder / "symphony")
    export_folded(model, folder / "folded", tokenizer=False)
    tensors, folded = (load_file(folder / name / "model.safetensors") for name in ("symphony", "folded"))
    return AutoConfig.from_pretrained(folder / "symphony"), tensors, folded


def orders_of(tensors):
    """The file's order, every weight before its graph, every graph before its weight, and a random one."""
    names = list(tensors)
    yield names
    yield sorted(names, key=lambda name: ".symphony." in name)
    yield sorted(names, key=lambda name: ".symphony." not in name)
    yield random.Random(0).sample(names, len(names))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def assert_folds(model, folder):
    config, tensors, folded = written(model, folder)
    (architecture,) = config.architectures
    for order in orders_of(tensors):
        found = list(WeightStream(config, architecture).fold((name, tensors[name]) for name in order))
        assert len(found) == len(folded)
        assert_same(dict(found), folded)
    return tensors, folded


@pytest.mark.parametrize("architecture", ROUTERS)
def test_the_result_is_the_folded_export(architecture, tmp_path):
    model = move_graphs(symphonize(tiny_model(MODEL_TYPES[architecture])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    tensors, folded = assert_folds(model, tmp_path)
    graphs = [name for name in tensors if name.endswith(SUFFIX)]
    changed = [name for name, tensor in folded.items() if not torch.equal(tensor, tensors[name])]
    assert len(changed) == len(graphs) * len(ROUTERS[architecture].parameters) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": (1,)},
        {"strength": -0.5, "normalization": "centred"},
        {"warmup_steps": 10},
        {"graph": "learned"},
    ],
)
def test_every_setting_that_folds(settings, tmp_path):
    model = move_graphs(symphonize(make_model("mixtral"), **settings))
    for module in model.modules():
        if hasattr(module, "symphony"):
            module.symphony.updates.fill_(3)
    assert_folds(model, tmp_path)


def test_sixteen_bits_whatever_the_default_dtype(tmp_path):
    config, tensors, folded = written(move_graphs(symphonize(make_model(dtype=torch.bfloat16))), tmp_path)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as engines do while they load
    try:
        found = dict(WeightStream(config, "OlmoeForCausalLM").fold(tensors.items()))
    finally:
        torch.set_default_dtype(before)
    assert_same(found, folded)


def test_a_reused_buffer_does_no_harm(tmp_path):
    config, tensors, folded = written(move_graphs(symphonize(make_model())), tmp_path)

    def reader():
        for name in sorted(tensors, key=lambda name: ".symphony." in name):
            buffer = tensors[name].clone()
            yield name, buffer
            buffer.zero_()

    found = {name: tensor.clone() for name, tensor in WeightStream(config, "OlmoeForCausalLM").fold(reader())}
    assert_same(found, folded)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return written(move_graphs(symphonize(make_model())), tmp_path_factory.mktemp("olmoe"))


ROUTER = "model.layers.1.mlp.gate"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{ROUTER}{SUFFIX}": None}, rf"lack {ROUTER}{SUFFIX}: a router's weight and its graph must come together"),
        ({f"{ROUTER}.symphony.updates": None}, rf"lack {ROUTER}.symphony.updates"),
        ({f"{ROUTER}{SUFFIX}": None, f"{ROUTER}.symphony.updates": None}, rf"lack {ROUTER}{SUFFIX}, "),
        ({f"{ROUTER}.weight": None}, rf"lack {ROUTER}.weight"),
        ({f"{ROUTER}{SUFFIX}": torch.eye(7)}, rf"graph of `{ROUTER}` is not usable: shape \(7, 7\)"),
        ({f"{ROUTER}{SUFFIX}": -torch.eye(8)}, rf"graph of `{ROUTER}` is not usable: 8 negative entries"),
        ({f"{ROUTER}.symphony.updates": torch.tensor(-1)}, rf"graph of `{ROUTER}` is not usable: -1, where a number"),
        ({f"other.layer{SUFFIX}": torch.eye(8)}, r"`other.layer.symphony.adjacency`: .* expected at `\*.mlp.gate"),
    ],
)
def test_graphs_that_are_missing_or_invalid(checkpoint, changes, message):
    config, tensors, _ = checkpoint
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(GraphError, match=message):
        list(WeightStream(config, "OlmoeForCausalLM").fold(tensors.items()))


@pytest.mark.parametrize(("pattern", "is_named"), [("*.1.mlp.gate", True), ("*.2.mlp.gate", False)])
def test_a_named_router_needs_its_graph_and_another_has_none(checkpoint, pattern, is_named):
    config, tensors, _ = checkpoint
    config = copy.deepcopy(config)
    config.symphony |= {"routers": [pattern], "top_k": 2}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{ROUTER}.symphony.")}
    stream = WeightStream(config, "OlmoeForCausalLM").fold(tensors.items())
    if is_named:
        with pytest.raises(GraphError, match=rf"lack {ROUTER}{SUFFIX}"):
            list(stream)
    else:
        assert torch.equal(dict(stream)[f"{ROUTER}.weight"], tensors[f"{ROUTER}.weight"])


@pytest.mark.parametrize("architecture", ROUTERS)
def test_a_router_goes_by_its_name_in_the_model(architecture, tmp_path):
    """On disk it may have another one, which the patterns of `routers` do not match."""
    model = tiny_model(MODEL_TYPES[architecture])
    router, other = list(expert_graphs(symphonize(copy.deepcopy(model))))[:2]
    symphonize(model, routers=[router]).save_pretrained(tmp_path)
    config, tensors = AutoConfig.from_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")
    assert list(WeightStream(config, architecture).fold(tensors.items()))
    config.symphony["routers"].append(other)
    with pytest.raises(GraphError, match=rf"lack model\.layers\.{layer_number(other, 0)}\..*\.symphony\.adjacency"):
        list(WeightStream(config, architecture).fold(tensors.items()))


@pytest.mark.parametrize("architecture", ROUTERS)
def test_a_training_checkpoint_has_the_names_of_the_model_in_memory(architecture, tmp_path):
    model = move_graphs(symphonize(tiny_model(MODEL_TYPES[architecture])))
    for name in ("final", "checkpoint-5"):
        model.save_pretrained(tmp_path / name)
    config = AutoConfig.from_pretrained(tmp_path / "checkpoint-5")
    final, tensors = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "checkpoint-5"))
    for order in orders_of(tensors):
        stream = WeightStream(config, architecture).fold((name, tensors[name]) for name in order)
        if tensors.keys() == final.keys():
            assert list(stream)
        else:
            with pytest.raises(
                FoldError, match=r"as in Trainer's `checkpoint-N`, .* serve the run's `final/`, or load"
            ):
                list(stream)


def test_weights_without_any_graph(checkpoint):
    config, _, folded = checkpoint
    with pytest.raises(GraphError, match=r"hold no expert graph \(no tensor is named `\*.mlp.gate.symphony.adjacency`"):
        list(WeightStream(config, "OlmoeForCausalLM").fold(folded.items()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_weight(checkpoint, dtype):
    config, tensors, _ = checkpoint
    changed = tensors | {f"{ROUTER}.weight": tensors[f"{ROUTER}.weight"].to(dtype)}
    with pytest.raises(FoldError, match=rf"weight of `{ROUTER}` is quantized \({dtype}\): load it in 16 bits"):
        list(WeightStream(config, "OlmoeForCausalLM").fold(changed.items()))


@pytest.mark.parametrize(
    ("entries", "architecture", "error", "message"),
    [
        ({"symphony": {"smoothing": "scores"}}, "OlmoeForCausalLM", FoldError, "smooths scores, .* use transformers"),
        ({"symphony": {"format": 99}}, "OlmoeForCausalLM", ConfigError, "has format 99, .* upgrade it"),
        ({"symphony": {}, "upcycled": {}}, "OlmoeForCausalLM", FoldError, "modules of `upcycle_modules`"),
        ({}, "OlmoeForCausalLM", FoldError, "config.json has no `symphony` settings"),
        ({"symphony": {}}, "DbrxForCausalLM", FoldError, "serves unfolded .* `symphony_hf.export_folded`"),
    ],
)
def test_configs_that_cannot_be_served(entries, architecture, error, message):
    with pytest.raises(error, match=message):
        WeightStream(PreTrainedConfig(**entries), architecture)
