"""A checkpoint holds the whole Symphony model, is refused when it does not, and folds into a plain one."""

import json
import sys
import types

import pytest
import torch
import transformers
from clients import read_config_as
from models import CONFIGS, VOCAB, assert_folded, llava_inputs, make_ids, make_llava, make_model, move_graphs
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from symphony_hf import (
    ConfigError,
    FoldError,
    GraphError,
    PatchError,
    SymphonyError,
    UnsupportedModelError,
    expert_graphs,
    export_folded,
    fold,
    is_symphonized,
    symphonize,
    unsymphonize,
    update_graphs,
)
from symphony_hf.checkpoints.graph_files import match_graphs

SETTINGS = [
    {},
    {"strength": 0.4, "normalization": "conditional"},
    {"strength": -0.3, "normalization": "centred"},
    {"smoothing": "scores"},
    {"graph": "learned"},
    {"layers": (1,)},
]


def saved(tmp_path, family="mixtral", **settings):
    model = move_graphs(symphonize(make_model(family), **settings))
    model.save_pretrained(tmp_path)
    return model


def edit_tensors(folder, edit):
    """Change the tensors of a checkpoint's only file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **symphony):
    config = json.loads((folder / "config.json").read_text())
    config["symphony"].update(symphony)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_round_trip_through_the_auto_class(family, settings, tmp_path):
    model, ids = saved(tmp_path, family, **settings), make_ids()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.symphony == model.config.symphony
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, graph in expert_graphs(model).items():
        assert torch.equal(expert_graphs(loaded)[name], graph)
    loaded.train()(ids, labels=ids).loss.backward()  # and it trains on
    update_graphs(loaded)
    assert any(not torch.equal(expert_graphs(loaded)[name], graph) for name, graph in expert_graphs(model).items()) or (
        settings.get("graph") == "learned"
    )


@pytest.mark.thorough
def test_concrete_and_base_classes(family, tmp_path):
    model, ids = saved(tmp_path, family), make_ids()
    concrete = getattr(transformers, CONFIGS[family][0].replace("Config", "ForCausalLM")).from_pretrained(tmp_path)
    assert torch.equal(concrete(ids).logits, model(ids).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert is_symphonized(body)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_half_precision_loads_the_graph_in_float32(dtype, graph, tmp_path):
    model, ids = saved(tmp_path / "ours", graph=graph), make_ids()
    make_model("mixtral").save_pretrained(tmp_path / "stock")
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=dtype)
    symphonize(by_hand, graph=str(tmp_path / "ours"))
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype),
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, device_map={"": "cpu"}),
    ):
        assert loaded.dtype == dtype
        for name, adjacency in expert_graphs(model).items():
            assert expert_graphs(loaded)[name].dtype == torch.float32
            assert torch.equal(expert_graphs(loaded)[name], adjacency)
        assert torch.equal(loaded(ids).logits, by_hand(ids).logits)


def test_a_half_precision_model_saves_the_graph_in_float32(tmp_path):
    model = saved(tmp_path / "a").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    graphs = {name: tensor for name, tensor in tensors.items() if name.endswith("symphony.adjacency")}
    assert len(graphs) == 3
    assert {graph.dtype for graph in graphs.values()} == {torch.float32}


def test_sharded_checkpoints(tmp_path):
    model, ids = move_graphs(symphonize(make_model())), make_ids()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    started = symphonize(make_model(), graph=str(tmp_path))
    assert all(torch.equal(expert_graphs(started)[name], graph) for name, graph in expert_graphs(model).items())


def test_in_the_middle_of_a_warmup(tmp_path):
    model, ids = symphonize(make_model(), warmup_steps=5).train(), make_ids()
    for step in range(3):
        model(make_ids(seed=step), labels=ids).loss.backward()
        update_graphs(model)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert float(loaded.model.layers[0].mlp.gate.symphony.strength()) == pytest.approx(0.6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_llava_round_trip_and_fold(tmp_path):
    model, inputs = move_graphs(symphonize(make_llava())), llava_inputs()
    model.save_pretrained(tmp_path / "ours")
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    for one in (model, loaded):
        assert [len(counter.graphs) for counter in one._symphony_tracker.counters] == [3]
    export_folded(model, tmp_path / "plain")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    assert not is_symphonized(plain)
    assert_folded(plain(**inputs).logits, model(**inputs).logits)


def test_a_fresh_model_from_a_symphony_config_starts_at_the_identity(tmp_path):
    model = saved(tmp_path)
    fresh = AutoModelForCausalLM.from_config(model.config)
    for adjacency in expert_graphs(fresh).values():
        assert torch.equal(adjacency, torch.eye(6) * 2 / 6)


def test_meta_models_can_be_made_and_initialized(tmp_path):
    model = saved(tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert all(graph.is_meta for graph in expert_graphs(empty).values())
    empty.to_empty(device="cpu")
    empty.init_weights()
    assert all(torch.equal(graph, torch.eye(6) * 2 / 6) for graph in expert_graphs(empty).values())


def test_a_model_inside_is_saved_with_its_graph_and_its_mark(tmp_path):
    ids = make_ids()
    model = move_graphs(symphonize(make_model()))
    llava = move_graphs(symphonize(make_llava()))
    for name, inner in (("body", model.model), ("language", llava.model.language_model)):
        inner.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["SymphonyOlmoeModel"]
        loaded, info = AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert torch.equal(loaded(ids).last_hidden_state, inner(ids).last_hidden_state)
    # Settings in its own config, too: a vision-language checkpoint may be loaded as its language model alone.
    stored = [model.config.symphony for model in (llava.model.language_model, llava)]
    assert [settings.pop("model_class") for settings in stored] == ["OlmoeModel", "LlavaForConditionalGeneration"]
    assert stored[0] == stored[1]


def test_a_config_object_may_be_used_again():
    config = make_model().config
    model = AutoModelForCausalLM.from_config(config)
    symphonize(model)
    assert not hasattr(config, "symphony")
    assert not is_symphonized(AutoModelForCausalLM.from_config(config))
    assert model.config is model.model.config


@pytest.mark.parametrize("way", ["save", "export", "unsymphonize"])
def test_a_weight_of_the_models_own_loss_that_was_set_later_is_kept(way, tmp_path):
    model = symphonize(make_model(router_aux_loss_coef=0.5))
    model.config.router_aux_loss_coef = 0.25
    if way == "unsymphonize":
        unsymphonize(model)
        assert (model.config.router_aux_loss_coef, model.router_aux_loss_coef) == (0.25, 0.5)
        return
    model.save_pretrained(tmp_path) if way == "save" else export_folded(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["router_aux_loss_coef"] == 0.25


def test_other_models_are_not_touched_by_the_loading_wraps(tmp_path):
    saved(tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    plain = make_model("mixtral")
    plain.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not is_symphonized(loaded)
    ids = make_ids()
    assert len(loaded(ids, output_router_logits=True).router_logits) == 3


def make_nllb(**settings):
    """Four encoder layers, and two decoder layers, each with a router unless a setting says otherwise."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "num_experts": 4,
        "max_position_embeddings": 32,
    }
    config = transformers.NllbMoeConfig(**{**defaults, **settings})
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("sizes", "settings", "num_encoder", "num_decoder"),
    [
        ({"decoder_sparse_step": 0}, {}, 4, 0),
        ({"encoder_sparse_step": 0}, {}, 0, 2),
        ({}, {"layers": (3,)}, 1, 0),
        ({}, {"layers": (1, 3)}, 2, 1),
        ({}, {"routers": ("model.encoder.layers.*.ffn.router",)}, 4, 0),
        ({}, {"routers": ("model.decoder.layers.*.ffn.router",)}, 0, 2),
        ({}, {"routers": ("model.encoder.layers.1.ffn.router", "model.decoder.layers.0.ffn.router")}, 1, 1),
    ],
    ids=str,
)
def test_an_encoder_decoder_whose_stacks_have_not_the_same_routers(sizes, settings, num_encoder, num_decoder, tmp_path):
    model, ids = move_graphs(symphonize(make_nllb(**sizes), **settings)), make_ids()
    model.save_pretrained(tmp_path)
    batch = {"input_ids": ids, "decoder_input_ids": make_ids(seed=1)}
    wanted = expert_graphs(model)
    assert [sum(f".{stack}." in name for name in wanted) for stack in ("encoder", "decoder")] == [
        num_encoder,
        num_decoder,
    ]
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(expert_graphs(loaded)[name], graph) for name, graph in wanted.items())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    loaded.train()(**batch, labels=ids).loss.backward()
    assert update_graphs(loaded)
    assert {type(module) for module in unsymphonize(loaded).modules()} == {
        type(module) for module in make_nllb(**sizes).modules()
    }


@pytest.mark.parametrize(
    ("symphony", "message"),
    [
        ({"layers": [1, 7]}, "NllbMoeForConditionalGeneration: layer 7 .*has no router"),
        ({"routers": ["*.encoder.layers.*.ffn.router", "*.decoder.*.ruter"]}, "ruter.* matches no module"),
    ],
)
def test_an_encoder_decoder_without_what_its_config_asks_for_is_refused(symphony, message, tmp_path):
    move_graphs(symphonize(make_nllb())).save_pretrained(tmp_path)
    edit_config(tmp_path, **symphony)
    with pytest.raises(UnsupportedModelError, match=message):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_a_dense_model_whose_config_asks_for_graphs_is_refused(tmp_path):
    model = symphonize(make_nllb())
    dense = make_nllb(encoder_sparse_step=0, decoder_sparse_step=0)
    dense.config.symphony = model.config.symphony
    dense.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no router found in NllbMoeForConditionalGeneration"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_a_model_built_from_what_cannot_be_is_refused_when_it_is_first_run():
    """When it is built nothing tells whether another model is around it; a stack of one runs as a part of that."""
    config = symphonize(make_nllb(decoder_sparse_step=0)).config
    ids = torch.ones(1, 4, dtype=torch.long)
    AutoModelForSeq2SeqLM.from_config(config)(input_ids=ids, decoder_input_ids=ids)
    config.symphony["layers"] = [7]
    with pytest.raises(UnsupportedModelError, match=r"layer 7 .*has no router"):
        AutoModelForSeq2SeqLM.from_config(config)(input_ids=ids, decoder_input_ids=ids)


# What a checkpoint may lack or have been given.


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.gate.symphony.adjacency"), r"layers\.1.*adjacency: missing"),
        (lambda t: t.pop("model.layers.2.block_sparse_moe.gate.symphony.updates"), r"layers\.2.*updates: missing"),
        (lambda t: t["model.layers.0.block_sparse_moe.gate.symphony.adjacency"].fill_(torch.nan), "36 non-finite"),
        (lambda t: t["model.layers.0.block_sparse_moe.gate.symphony.adjacency"].neg_(), "negative"),
        (lambda t: t["model.layers.0.block_sparse_moe.gate.symphony.adjacency"][0, 1].add_(1), "not symmetric"),
    ],
)
def test_an_unusable_graph_is_an_error_that_names_it(edit, message, tmp_path):
    saved(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(GraphError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_graph_of_another_shape_is_an_error(tmp_path):
    saved(tmp_path)
    name = "model.layers.0.block_sparse_moe.gate.symphony.adjacency"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.eye(5)}))
    # transformers itself refuses other shapes, after its report has named the tensor.
    with pytest.raises((GraphError, RuntimeError), match=r"mismatch|another shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(GraphError, match=r"layers\.0.*another shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("symphony", "message"),
    [
        ({"format": 3}, "format 3.*reads up to 2"),
        ({"format": "1"}, "whole number"),
        ({"strenght": 1}, "did you mean `strength`"),
        ({"decay": 1.5}, "decay"),
        ({"layers": [9]}, "layer 9"),
    ],
)
def test_unreadable_settings_are_refused(symphony, message, tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, **symphony)
    with pytest.raises(SymphonyError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_index_that_another_save_left_is_not_read(tmp_path):
    """Transformers loads the whole file, and leaves the index of shards when it saves one."""
    model = move_graphs(symphonize(make_model()))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model.save_pretrained(tmp_path)
    graphs = expert_graphs(symphonize(make_model(), graph=str(tmp_path)))
    assert all(torch.equal(graphs[name], graph) for name, graph in expert_graphs(model).items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "does not exist"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "truncated"),
        (lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json"), "no index"),
        (
            lambda f: edit_tensors(f, lambda t: [t.pop(name) for name in list(t) if name.endswith("adjacency")]),
            "holds no expert graph",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.block_sparse_moe.gate.symphony.adjacency")),
            r"no graph for model\.layers\.1\.mlp\.gate; it has",
        ),
        (
            lambda f: edit_tensors(
                f, lambda t: t["model.layers.1.block_sparse_moe.gate.symphony.adjacency"][1, 0].add_(1)
            ),
            "not symmetric",
        ),
    ],
)
def test_a_graph_to_start_from_is_checked_before_anything_changes(spoil, message, tmp_path):
    saved(tmp_path)
    spoil(tmp_path)
    model = make_model("mixtral")
    keys = list(model.state_dict())
    with pytest.raises(GraphError, match=message):
        symphonize(model, graph=str(tmp_path))
    assert not is_symphonized(model)
    assert list(model.state_dict()) == keys


def test_a_graph_to_start_from_goes_by_layer_where_the_names_on_disk_differ(tmp_path):
    model = move_graphs(symphonize(make_model("mixtral", num_hidden_layers=12)))
    model.save_pretrained(tmp_path)
    started = symphonize(make_model("mixtral", num_hidden_layers=12), graph=str(tmp_path / "model.safetensors"))
    for name, graph in expert_graphs(model).items():
        assert torch.equal(expert_graphs(started)[name], graph)
    assert started.config.symphony["graph"] == "ema"
    with pytest.raises(GraphError, match=r"shape \(6, 6\) instead of \(8, 8\)"):
        symphonize(make_model("olmoe", num_hidden_layers=12), graph=str(tmp_path))


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_graph_to_start_from_is_the_layers_own(family, tmp_path):
    """As many graphs as routers are not enough: those of layers 0 and 1 are none of layers 1 and 2."""
    saved(tmp_path, family, layers=(0, 1))
    with pytest.raises(GraphError, match=r"no graph for model\.layers\.2\.mlp\.gate; it has .*layers\.0"):
        symphonize(make_model(family), layers=(1, 2), graph=str(tmp_path))
    assert list(expert_graphs(symphonize(make_model(family), layers=(1,), graph=str(tmp_path))))


def test_renamed_graphs_with_the_same_numbers_go_by_the_end_of_their_names():
    names = [f"model.language_model.layers.{n}.mlp.{kind}.gate" for n in (1, 10) for kind in ("vision_moe", "text_moe")]
    stored = {name.replace(".language_model", ""): torch.eye(4) * (n + 1) for n, name in enumerate(names)}
    matched = match_graphs(dict(sorted(stored.items())), [(name, 4) for name in names], "folder")
    assert [int(graph[0, 0]) for graph in matched] == [1, 2, 3, 4]
    for unclear in (["layers.1.mlp.gate"], ["a.layers.1.mlp.gate", "b.layers.1.mlp.gate"]):
        with pytest.raises(GraphError, match=r"no graph for model\.x\.layers\.1"):
            match_graphs(
                dict.fromkeys(unclear, torch.eye(4)),
                [("model.x.layers.1.mlp.gate", 4), ("model.y.layers.1.mlp.gate", 4)],
                "folder",
            )


# Folding.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_export_runs_in_plain_transformers_to_the_same_logits(family, dtype, tmp_path):
    make_model(family, dtype=dtype).save_pretrained(tmp_path / "stock")
    model, ids = move_graphs(symphonize(make_model(family, dtype=dtype))), make_ids(4, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = model.config.symphony
    assert export_folded(model, tmp_path / "folded") == tmp_path / "folded"
    assert is_symphonized(model)
    assert model.config.symphony is settings
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stock, folded = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "folded"))
    assert {n: (t.shape, t.dtype) for n, t in folded.items()} == {n: (t.shape, t.dtype) for n, t in stock.items()}
    assert sorted(p.name for p in (tmp_path / "folded").iterdir()) == sorted(
        p.name for p in (tmp_path / "stock").iterdir()
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "folded")]
    assert configs[0] == configs[1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert_folded(plain(ids).logits, model(ids).logits)


@pytest.mark.thorough
def test_folded_export_in_a_process_without_us(tmp_path, plain_python):
    model, ids = move_graphs(symphonize(make_model())), make_ids(8, 32)
    export_folded(model, tmp_path / "folded")
    outputs = model(ids, output_router_logits=True)
    save_file(
        {
            "ids": ids,
            "logits": outputs.logits.detach().contiguous(),
            "routing": torch.stack(outputs.router_logits).detach(),
        },
        tmp_path / "expected.safetensors",
    )
    plain_python(
        """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = load_file(sys.argv[2])
outputs = model(expected["ids"], output_router_logits=True)
assert (outputs.logits - expected["logits"]).abs().max() <= 1e-5
chosen = [logits.topk(3).indices.sort().values for logits in outputs.router_logits]
wanted = [logits.topk(3).indices.sort().values for logits in expected["routing"]]
same = torch.stack([(a == b).all(-1).float().mean() for a, b in zip(chosen, wanted)]).mean()
assert same >= 0.999, same
assert "symphony_hf" not in sys.modules
""",
        tmp_path / "folded",
        tmp_path / "expected.safetensors",
    )


def test_fold_in_place(family):
    model, ids = move_graphs(symphonize(make_model(family))), make_ids()
    logits = model(ids).logits
    assert fold(model) is model
    assert not is_symphonized(model)
    assert_folded(model(ids).logits, logits)
    assert not hasattr(model.config, "symphony")


def test_in_16_bits_folding_changes_no_bit(family):
    """Rounding A W to 16 bits changes the experts of some tokens, so a router there multiplies by what is stored."""
    model, ids = move_graphs(symphonize(make_model(family, dtype=torch.bfloat16))), make_ids()
    logits = model(ids).logits
    assert torch.equal(fold(model)(ids).logits, logits)


def test_under_autocast_folding_changes_no_bit(family):
    model, ids = move_graphs(symphonize(make_model(family))), make_ids()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
        assert torch.equal(fold(model)(ids).logits, logits)


def test_what_cannot_be_folded_is_refused(tmp_path):
    model = move_graphs(symphonize(make_model(), smoothing="scores"))
    for attempt in (lambda: fold(model), lambda: export_folded(model, tmp_path / "out")):
        with pytest.raises(FoldError, match="only smoothing=`logits` folds"):
            attempt()
    assert is_symphonized(model)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PatchError, match="not symphonized"):
        fold(make_model())
    with pytest.raises(PatchError, match="not symphonized"):
        unsymphonize(make_model())


# Other software that reads the checkpoint.


def test_the_marks_are_in_the_file_alone(tmp_path):
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SymphonyMixtralForCausalLM"]
    assert config["model_type"] == "symphony_hf"
    assert config["symphony_hf"] == {"replaced": {"model_type": "mixtral", "dtype": "float32"}}
    # Either name is looked up in torch, before transformers 4.56 only the second, and an error shows the value.
    assert config["dtype"] == config["torch_dtype"] == "unreadable without symphony_hf: pip install symphony-hf"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for found in (loaded.config, transformers.AutoConfig.from_pretrained(tmp_path)):
        assert found.architectures == ["MixtralForCausalLM"]
        assert found.to_dict()["model_type"] == "mixtral"
        assert found.dtype == torch.float32
        assert found.to_dict().keys().isdisjoint({"symphony_hf", "torch_dtype"})
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert model.config.architectures == ["MixtralForCausalLM"]


@pytest.mark.parametrize("entry", [None, 3, {}, {"replaced": {"model_type": 3}}, {"replaced": {"hidden_size": 1}}])
def test_marks_that_were_damaged_are_refused(entry, tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"symphony_hf": entry}))
    with pytest.raises(ConfigError, match=r"config\.json`: `symphony_hf` must hold the values"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "mergekit"])
def test_an_engine_with_classes_of_its_own_sees_the_mark(engine, tmp_path, monkeypatch):
    """And code that only imported the engine, as TRL's trainers do, sees its family's class."""
    saved(tmp_path)
    monkeypatch.setitem(sys.modules, engine, types.ModuleType(engine))
    configs = (read_config_as(engine, tmp_path), transformers.AutoConfig.from_pretrained(tmp_path))
    assert [config.architectures for config in configs] == [["SymphonyMixtralForCausalLM"], ["MixtralForCausalLM"]]
    assert [config.model_type for config in configs] == ["mixtral"] * 2


def test_a_loaded_and_folded_config_names_no_nested_class(tmp_path):
    make_llava().save_pretrained(tmp_path / "plain")
    move_graphs(symphonize(make_llava())).save_pretrained(tmp_path / "graphs")
    plain, loaded = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("plain", "graphs"))
    plain.save_pretrained(tmp_path / "plain again")
    fold(loaded).save_pretrained(tmp_path / "folded")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain again", "folded")]
    assert configs[0] == configs[1]


def test_trl_and_peft_read_it(tmp_path):
    model, ids = saved(tmp_path / "ours"), make_ids()
    trl_utils = pytest.importorskip("trl.trainer.utils")
    peft = pytest.importorskip("peft")
    through_trl = trl_utils.create_model_from_path(str(tmp_path / "ours"), dtype="float32")
    assert torch.equal(through_trl(ids).logits, model(ids).logits)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours"),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["symphony"], init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(again(ids).logits, adapted(ids).logits)
    assert not torch.equal(again(ids).logits, model(ids).logits)
    inner = again.base_model.model
    for attempt, error in ((lambda: export_folded(inner, tmp_path / "f"), FoldError), (lambda: fold(inner), FoldError)):
        with pytest.raises(error, match="merge_and_unload"):
            attempt()
    with pytest.raises(PatchError, match="merge_and_unload"):
        unsymphonize(inner)
    with again.disable_adapter():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_export_into_a_folder_that_exists_replaces_files(tmp_path):
    model = move_graphs(symphonize(make_model()))
    export_folded(model, tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    move_graphs(model, seed=3)
    export_folded(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != first
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    export_folded(model, tmp_path)
    assert [file.name for file in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("make", [make_model, make_llava])
def test_a_part_of_a_model_is_neither_folded_nor_set_back(make, tmp_path):
    """The hooks and the settings of the model around it would stay."""
    model = move_graphs(symphonize(make()))
    body, config = model.model if make is make_model else model.model.language_model, model.config.to_dict()
    for part in (body, torch.nn.Sequential(model)):
        for call in (fold, unsymphonize):
            with pytest.raises(PatchError, match="give the model that was symphonized"):
                call(part)
    with pytest.raises(PatchError, match="give the model that was symphonized"):
        export_folded(body, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert is_symphonized(model)
    assert model.config.to_dict() == config
    assert not is_symphonized(fold(model))


def test_config_error_is_also_a_value_error():
    assert issubclass(ConfigError, ValueError)


@pytest.mark.thorough
def test_threads_that_load_a_first_symphony_checkpoint_at_once(tmp_path, plain_python):
    """All but one come while the import of symphony_hf has begun and not ended."""
    symphonize(make_model()).save_pretrained(tmp_path)
    plain_python(
        """
import os, sys, threading, time
os.environ["SYMPHONY_HF_AUTOLOAD"] = "1"
import symphony_hf_autoload
symphony_hf_autoload.install()
from transformers import AutoConfig
found = []
def load():
    try:
        found.append(AutoConfig.from_pretrained(sys.argv[1]).model_type)
    except ValueError as error:
        found.append(str(error))
assert "symphony_hf" not in sys.modules
threads = [threading.Thread(target=load) for _ in range(20)]
for thread in threads:
    thread.start()
    time.sleep(0.02)
for thread in threads:
    thread.join()
assert found == ["olmoe"] * 20, found
""",
        tmp_path,
    )
