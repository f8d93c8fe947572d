"""A folded checkpoint, as a server loads it, has the stock class's names, shapes and config, and the same logits."""

import json
import re

import numpy as np
import pytest
import torch
from models import make_ids, make_model, move_graphs
from naive_reader import NaiveReader
from safetensors.numpy import load_file

from symphony_hf import export_folded, symphonize

pytestmark = pytest.mark.filterwarnings("ignore:export_folded. .*qwen2_moe")  # llama.cpp, on the 7.4B container
CONTAINER = {  # of the 7.4B recipe: every other layer stays dense
    **{"decoder_sparse_step": 2, "norm_topk_prob": True, "num_hidden_layers": 4, "num_experts": 4},
}
FORMS = {
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "7.4B": ("qwen2_moe", CONTAINER),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def make(form, **settings):
    family, overrides = form
    return make_model(family, **overrides, **settings)


def described(folder):
    return {
        name: (tensor.shape, tensor.dtype)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_it_is_what_the_stock_class_writes(form, tmp_path):
    make(form).save_pretrained(tmp_path / "stock")
    export_folded(move_graphs(symphonize(make(form))), tmp_path / "folded")
    assert described(tmp_path / "folded") == described(tmp_path / "stock")
    written = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("folded", "stock")]
    assert written[0] == written[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("folded", "stock")]
    assert configs[0] == configs[1]
    assert not configs[0]["architectures"][0].startswith("Symphony")
    assert not re.search("symphony|auto_map", (tmp_path / "folded" / "config.json").read_text())


def test_a_reader_that_knows_nothing_of_us_computes_the_same(form, tmp_path):
    model = move_graphs(symphonize(make(form)))
    export_folded(model, tmp_path)
    ids = make_ids(1, 24)
    with torch.no_grad():
        wanted = model(ids).logits[0].double().numpy()
    reader = NaiveReader(tmp_path)
    got = reader.logits(ids[0].numpy())
    # float64 against float32, through up to 4 layers: 2e-7 to 3e-7 of the largest logit were seen. The routers are far
    # from ties, so both choose the same experts; another routing is a thousand times that (next test).
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert reader.unread == set()


def test_the_reader_sees_whether_the_graph_is_in_the_routers(form, tmp_path):
    """The comparison above can fail: without its graph the same model computes something else."""
    export_folded(symphonize(make(form)), tmp_path)
    ids = make_ids(1, 24)
    with torch.no_grad():
        wanted = move_graphs(symphonize(make(form)))(ids).logits[0].double().numpy()
    assert np.abs(NaiveReader(tmp_path).logits(ids[0].numpy()) - wanted).max() > 1e-3 * np.abs(wanted).max()


def merged(name, family):
    """Return an expert's tensor name as llama.cpp's conversion names the stack of all experts."""
    if family == "mixtral":
        return re.sub(r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+", r"\1.feed_forward.experts", name)
    return re.sub(r"(experts)\.\d+", r"\1", name)


def test_llama_cpp_has_a_place_for_every_tensor(form, tmp_path):
    """The names are in the tables of its Python package, which its conversion script uses but does not come with."""
    gguf = pytest.importorskip("gguf")
    family = form[0]
    architecture = {"mixtral": "LLAMA", "olmoe": "OLMOE", "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE"}[family]
    export_folded(move_graphs(symphonize(make(form))), tmp_path)
    places = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), 8)
    homeless = {n for n in described(tmp_path) if places.get_name(merged(n, family), (".weight", ".bias")) is None}
    # Its Qwen2-MoE has no dense layers between the sparse ones, as the 7.4B container does: that it cannot convert.
    dense = {f"model.layers.{layer}.mlp.{role}_proj.weight" for layer in (0, 2) for role in ("gate", "up", "down")}
    assert homeless == (dense if form[1] is CONTAINER else set())
    assert places.get_name("model.layers.0.mlp.gate.symphony.adjacency", (".weight", ".bias")) is None
