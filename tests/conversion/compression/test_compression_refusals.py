"""Models that cannot be made smaller are refused with the reason and a remedy, before anything is written."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from models import COMMON, make_config, make_model
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

from symphony_hf import symphonize
from symphony_hf.conversion.compression.layers import check_number, expert_layers
from symphony_hf.conversion.compression.merge import merge_experts
from symphony_hf.conversion.compression.prune import prune_experts
from symphony_hf.conversion.compression.rebuild import kept, with_fewer_experts, with_top_k
from symphony_hf.conversion.compression.settings import MergeSettings, PruneSettings, TopKSettings
from symphony_hf.conversion.compression.top_k import sweep_top_k
from symphony_hf.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FoldError,
    GraphError,
    UnsupportedModelError,
)
from symphony_hf.experiments.conformance.tiny import tiny_model


@pytest.fixture
def prune(data_folder, tmp_path):
    def run(model, **changes):
        settings = {"experts": 4, "by": "load", "data": data_folder, "block_size": 16, "output": str(tmp_path / "out")}
        try:
            return prune_experts(PruneSettings(model=model, **(settings | changes)))
        finally:
            assert not (tmp_path / "out").exists()

    return run


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", "does not take"),
        ("jetmoe", "no module `experts`"),
        ("dbrx", "not stacked"),
        ("inkling_text", "9 choices for 8 experts"),
        ("longcat_flash", "not stacked"),
    ],
)
def test_experts_of_another_form(family, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        expert_layers(tiny_model(family))


def test_layers_whose_experts_are_looked_up_by_the_token():
    model = tiny_model("deepseek_v4")
    layers = expert_layers(model)
    with pytest.raises(UnsupportedModelError, match=r"other tensors than those of its routers and experts"):
        with_fewer_experts(model, layers, [kept(range(4)) for _ in layers])


class BiasPerChoice(OlmoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.num_experts_per_tok))


def test_tensors_that_depend_on_the_top_k():
    model = BiasPerChoice(make_config("olmoe"))
    with pytest.raises(UnsupportedModelError, match=r"BiasPerChoice: with top-1 of 8 experts tensors change.* bias"):
        with_top_k(model, expert_layers(model), 1)


def test_a_dense_model(checkpoint, prune):
    config = transformers.LlamaConfig(**COMMON | {"vocab_size": 300})
    with pytest.raises(UnsupportedModelError, match="no router"):
        prune(checkpoint("dense", AutoModelForCausalLM.from_config(config)))


@pytest.mark.parametrize(
    ("experts", "reason"), [(9, "9 experts of 8"), (2, "chooses 3 experts, so 2 are too few.*symphony topk")]
)
def test_numbers_of_experts_that_cannot_be(experts, reason, plain, prune):
    with pytest.raises(UnsupportedModelError, match=reason):
        prune(plain, experts=experts)


@pytest.mark.parametrize("experts", [5, 2])
def test_numbers_that_groups_do_not_divide(experts):
    layers = expert_layers(tiny_model("deepseek_v3"))
    with pytest.raises(UnsupportedModelError, match=r"2 groups of experts.*multiple of 2"):
        check_number(layers, experts, "prune")
    check_number(layers, 4, "prune")


def test_a_plain_model_has_no_learned_graph(plain, prune, data_folder, tmp_path):
    with pytest.raises(GraphError, match="--graph counted"):
        prune(plain, by="centrality")
    with pytest.raises(GraphError, match="--graph counted"):
        merge_experts(MergeSettings(model=plain, output=str(tmp_path / "out"), experts=4, by="graph", data=data_folder))


def test_a_graph_that_has_not_learned(checkpoint, tokenizer, prune):
    model = symphonize(make_model("olmoe", vocab_size=len(tokenizer)))
    with pytest.raises(GraphError, match="has no co-selections"):
        prune(checkpoint("new", model), by="centrality")


def test_smoothing_on_scores_does_not_fold(checkpoint, tokenizer, prune):
    model = symphonize(make_model("olmoe", vocab_size=len(tokenizer)), smoothing="scores")
    with pytest.raises(FoldError, match="smooths scores"):
        prune(checkpoint("scores", model))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantized"),
        ({"upcycled": {"modules": []}}, "upcycle_modules"),
    ],
)
def test_checkpoints_that_no_stock_class_of_fewer_experts_has(entry, reason, plain, prune, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    config = json.loads((Path(plain) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(UnsupportedModelError, match=reason):
        prune(str(folder))


def test_a_part_of_a_larger_model(plain, prune, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in Path(plain).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OlmoeForImages"]}))
    with pytest.raises(UnsupportedModelError, match="the rest would be lost"):
        prune(str(folder))


def test_an_output_that_exists(plain, data_folder, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists"):
        prune_experts(PruneSettings(model=plain, output=str(tmp_path / "there"), experts=4, by="load"))


def test_too_few_documents(plain, prune):
    with pytest.raises(DataError, match="intervals need 10"):
        prune(plain, documents=4)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (PruneSettings, {"by": "graph"}, "`by` is 'graph'"),
        (MergeSettings, {"by": "output"}, "did you mean `outputs`"),
        (MergeSettings, {"by": "graph", "graph": "count"}, "did you mean `counted`"),
        (MergeSettings, {"by": "graph", "experts": 0}, "`experts` must be at least 1"),
        (MergeSettings, {"by": "graph", "output": None}, "give the folder"),
        (MergeSettings, {"by": "graph", "dtype": "int8"}, "`dtype`"),
        (MergeSettings, {"by": "graph", "block_size": 1}, "`block_size`"),
    ],
)
def test_settings_out_of_range(kind, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        kind(**{"model": "m", "output": "out", "experts": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top_k": (0, 1)}, "from 1"),
        ({"top_k": (1, 1)}, "each once"),
        ({"top_k": (1, 2), "output": "out"}, "give both"),
        ({"top_k": (1, 2), "keep": 2}, "give both"),
        ({"top_k": (1, 2), "keep": 3, "output": "out"}, "not among those tried"),
        ({"keep": 0, "output": "out"}, "keep"),
    ],
)
def test_sweeps_out_of_range(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        TopKSettings(model="m", **changes)


def test_a_larger_top_k_is_no_sweep(plain, tmp_path):
    message = "^topk: the model selects 3 experts per token, so 4 cannot be measured: give at most 3$"
    with pytest.raises(UnsupportedModelError, match=message):
        sweep_top_k(TopKSettings(model=plain, top_k=(2, 4), result=str(tmp_path / "sweep.json")))
    assert not (tmp_path / "sweep.json").exists()


def test_windows_longer_than_the_context(plain, prune, data_folder, tmp_path, monkeypatch):
    """They are refused before the weights are loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    message = "the text: a window has 65 tokens, and `.*` takes 64: set --block_size to 64 or less$"
    with pytest.raises(ConfigError, match=f"^prune: {message}"):
        prune(plain, block_size=65)
    with pytest.raises(ConfigError, match=f"^merge: {message}"):
        merge_experts(MergeSettings(model=plain, output=str(tmp_path / "out"), experts=4, by="outputs", block_size=65))
    with pytest.raises(ConfigError, match=f"^topk: {message}"):
        sweep_top_k(TopKSettings(model=plain, top_k=(2,), block_size=65, result=str(tmp_path / "sweep.json")))


def test_layers_of_different_numbers():
    model = make_model("qwen2_moe")
    other = make_model("qwen2_moe", num_experts_per_tok=1)
    model.model.layers[0].mlp = other.model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match="top-1 of 6, top-2 of 6"):
        expert_layers(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"result": "folder"}, "`.*folder` is a folder, and the result is a file"),
        ({"result": "file/result.json"}, "because `.*file` is a file"),
        ({"output": "file/out"}, "because `.*file` is a file"),
        ({"output": "new/out", "result": "new/out"}, "is the output or a folder of it"),
        ({"output": "new/out", "result": "new"}, "is the output or a folder of it"),
    ],
)
def test_places_that_cannot_be_written_to_are_refused_before_the_work(changes, reason, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    places = {name: str(tmp_path / place) for name, place in ({"output": "out"} | changes).items()}
    with pytest.raises(ConfigError, match=f"prune: .*{reason}"):
        prune_experts(PruneSettings(model="no such model", experts=4, by="load", **places))
    with pytest.raises(ConfigError, match=f"topk: .*{reason}"):
        sweep_top_k(TopKSettings(model="no such model", top_k=(2,), **places))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_sweep_s_own_file_needs_a_place_too(tmp_path, monkeypatch):
    (tmp_path / "symphony-topk.json").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"`symphony-topk\.json` is a folder"):
        sweep_top_k(TopKSettings(model="no such model"))
