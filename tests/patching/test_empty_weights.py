"""Models that are built without weights, on the meta device or by accelerate, and loaded afterwards."""

import contextlib

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from models import make_config, make_ids, make_model, move_graphs
from transformers import AutoModelForCausalLM

from symphony_hf import GraphError, expert_graphs, symphonize

ON_CPU = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = dict.fromkeys(ON_CPU, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}


def load_empty(source, folder, device_map, *, patch=False, **settings):
    """Load a checkpoint as accelerate's documentation shows; with `patch`, symphonize before the weights are loaded."""
    source.save_pretrained(folder / "model", save_original_format=False)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(source.config)
    if patch:
        symphonize(empty)
    return load_checkpoint_and_dispatch(
        empty, folder / "model", device_map=device_map, offload_folder=folder / "off", **settings
    )


@pytest.mark.parametrize("settings", [{}, {"routers": "*.gate"}, {"smoothing": "scores"}], ids=str)
def test_symphonize_inside_a_meta_device_context(settings):
    model, ids = make_model(), make_ids()
    before = model(ids).logits
    with torch.device("meta"):
        symphonize(model, **settings)
    assert {graph.device.type for graph in expert_graphs(model).values()} == {"cpu"}
    assert torch.equal(model(ids).logits, before) or settings.get("smoothing") == "scores"
    model.train()(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_a_meta_model_is_symphonized_and_initialized_later(inside):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config("olmoe"))
    with torch.device("meta") if inside else contextlib.nullcontext():
        symphonize(model)
    model.to_empty(device="cpu")
    model.init_weights()
    assert all(torch.equal(graph, torch.eye(8) * 3 / 8) for graph in expert_graphs(model).values())
    assert torch.isfinite(model(make_ids()).logits).all()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_symphony_checkpoint_that_accelerate_loads(on_disk, tmp_path):
    model, ids = move_graphs(symphonize(make_model())), make_ids()
    settings = {"device_map": ON_DISK, "offload_buffers": True} if on_disk else {"device_map": {"": "cpu"}}
    loaded = load_empty(model, tmp_path, **settings)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_graphs_that_accelerate_leaves_out_are_named(tmp_path):
    """Without `offload_buffers`, accelerate loads no buffer of a module on disk, without a message."""
    loaded = load_empty(move_graphs(symphonize(make_model())), tmp_path, ON_DISK)
    with pytest.raises(GraphError, match="offload_buffers=True"):
        loaded(make_ids())


def test_a_stock_checkpoint_that_accelerate_loads_into_a_symphony_model(tmp_path):
    model, ids = make_model(), make_ids()
    loaded = load_empty(model, tmp_path, ON_DISK, patch=True)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(expert_graphs(loaded)["model.layers.1.mlp.gate"], torch.eye(8) * 3 / 8)


def test_a_state_dict_assigned_to_an_empty_symphony_model():
    model, ids = move_graphs(symphonize(make_model())), make_ids()
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(ids).logits, model(ids).logits)
