"""Saved and loaded again: to the bit, on a base that is made ready for it; and what does not fit is refused."""

import json
import shutil

import peft
import pytest
import torch
from accelerate import cpu_offload
from adapted import DECAY, adapt, adapted_model, assert_same_graphs, logits, refuses
from models import assert_folded, make_ids, make_llava, make_model, move_graphs
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor

from symphony_hf import (
    ConfigError,
    GraphError,
    PatchError,
    SymphonyWarning,
    expert_graphs,
    export_folded,
    fold,
    is_symphonized,
    load_adapter,
    lora_config,
    symphonize,
    update_graphs,
)
from symphony_hf.conversion.adapters import loading, record
from symphony_hf.conversion.adapters.loading import restore_adapter
from symphony_hf.experiments.conformance.tiny import tiny_model

CASES = [{}, {"experts": True}, {"router": "train"}, {"router": "train", "experts": True, "attention": False}]
NAMES = ["graph", "graph, experts", "train", "train, experts alone"]


@pytest.mark.parametrize("settings", CASES, ids=NAMES)
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_round_trip_is_exact(tmp_path, family, settings):
    adapted = adapted_model(family, **settings)
    wanted = logits(adapted)
    assert not torch.equal(wanted, logits(make_model(family)))
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(make_model(family), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    assert_same_graphs(loaded, adapted)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(make_model(family)))
    assert torch.equal(logits(loaded), wanted)
    for base in (make_model(family), symphonize(make_model(family), decay=DECAY)):  # with PEFT's own loader
        assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), wanted)


def test_unloading_keeps_the_adapters_graphs_on_the_base():
    """As PEFT keeps every module that an adapter saves whole; disabling it gives the base (above)."""
    adapted = adapted_model()
    base = adapted.unload()
    assert_same_graphs(base, adapted_model())
    graphs = {name: tensor for name, tensor in base.state_dict().items() if ".symphony." in name}
    untouched = symphonize(make_model(), decay=DECAY)
    untouched.load_state_dict(graphs, strict=False)
    assert torch.equal(logits(base), logits(untouched))


@pytest.mark.parametrize("adapted_layer", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_the_head_or_the_embeddings(tmp_path, adapted_layer):
    """PEFT saves the layer itself with it."""
    base = symphonize(make_model(), decay=DECAY)
    config = lora_config(base, target_modules=[adapted_layer], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), logits(adapted))


@pytest.mark.parametrize("wide", [True, False])
def test_in_bfloat16(tmp_path, wide):
    """LoRA has the type that it was trained in; the graph is float32."""
    model = symphonize(make_model(dtype=torch.bfloat16), decay=DECAY)
    config = lora_config(model, router="train", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(make_model(dtype=torch.bfloat16), tmp_path)
    kinds = {p.dtype for name, p in loaded.named_parameters() if ".lora_" in name}
    assert kinds == {torch.float32 if wide else torch.bfloat16}
    assert {graph.dtype for graph in expert_graphs(loaded).values()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(adapted))


def test_the_base_is_the_base_to_the_bit():
    adapted = adapted_model(experts=True, router="train")
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(make_model()))
        start = torch.eye(8) * 3 / 8
        assert all(torch.equal(graph, start) for graph in expert_graphs(adapted).values())


@pytest.mark.thorough
@pytest.mark.parametrize("settings", CASES, ids=NAMES)
def test_merged_it_is_a_symphony_model_that_folds(tmp_path, settings):
    adapted = adapted_model(**settings)
    wanted, graphs = logits(adapted), expert_graphs(adapted)
    merged = adapted.merge_and_unload()
    # LoRA is added to the weights instead of to what they give.
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert list(expert_graphs(merged)) == [f"model.layers.{layer}.mlp.gate" for layer in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(expert_graphs(merged).values(), graphs.values(), strict=True))
    assert [name for name, _ in merged.named_modules()] == [
        name for name, _ in symphonize(make_model()).named_modules()
    ]
    before = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path / "merged")), before)
    export_folded(merged, tmp_path / "folded")
    assert_folded(logits(type(merged).from_pretrained(tmp_path / "folded")), before)
    assert_folded(logits(fold(merged)), before)
    assert not is_symphonized(merged)


@pytest.mark.parametrize("family", ["olmoe", "phimoe"])
def test_merged_it_can_be_trained_on(family):
    """The router that an adapter trained has taken the place of the one that was patched."""
    from symphony_hf.experiments.conformance.batches import tiny_batch
    from symphony_hf.experiments.conformance.tiny import tiny_model

    base = tiny_model(family)
    batch = tiny_batch(base)
    merged = adapt(symphonize(base, decay=DECAY), router="train").merge_and_unload().train()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    before = expert_graphs(merged)
    update_graphs(merged)
    merged(**batch).loss.backward()
    assert update_graphs(merged)
    after = expert_graphs(merged)
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], graph) for name, graph in before.items())


@pytest.mark.thorough
@pytest.mark.parametrize("router", ["graph", "train"])
def test_two_adapters_with_graphs_of_their_own(tmp_path, router):
    model = adapted_model(router=router)
    adapt(model, "second", seed=1, router=router)
    wanted, graphs = {}, {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name], graphs[name] = logits(model), expert_graphs(model)
    assert not torch.equal(wanted["default"], wanted["second"])
    assert all(not torch.equal(graphs["default"][n], g) for n, g in graphs["second"].items() if n in graphs["default"])
    model.save_pretrained(tmp_path)
    loaded = load_adapter(make_model(), tmp_path)
    assert loaded is load_adapter(loaded, tmp_path / "second", name="second")
    for name in ("default", "second", "default"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), wanted[name])
        assert all(
            torch.equal(a, b) for a, b in zip(expert_graphs(loaded).values(), graphs[name].values(), strict=True)
        )
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(make_model()))
    loaded.delete_adapter("second")
    assert torch.equal(logits(loaded), wanted["default"])


def test_only_the_active_adapters_graph_moves():
    model = adapted_model()
    adapt(model, "second", seed=1)
    model.set_adapter("default")
    first = expert_graphs(model)
    model.set_adapter("second")
    second = expert_graphs(model)
    update_graphs(model)
    ids = make_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert update_graphs(model)
    assert all(not torch.equal(graph, second[name]) for name, graph in expert_graphs(model).items())
    model.set_adapter("default")
    assert all(torch.equal(graph, first[name]) for name, graph in expert_graphs(model).items())


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    adapted_model(router="train").save_pretrained(tmp_path)
    model = load_adapter(make_model(), tmp_path, trainable=True)
    assert model.training
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in name for name in trained) == 24
    assert sum(name.endswith("mlp.gate.modules_to_save.default.weight") for name in trained) == 3
    assert len(trained) == 27


@pytest.mark.parametrize("was_trained", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_a_further_adapter_leaves_the_mode(tmp_path, was_trained, trainable):
    adapted_model().save_pretrained(tmp_path)
    model = load_adapter(make_model(), tmp_path, trainable=True).train(was_trained)
    load_adapter(model, tmp_path, name="second", trainable=trainable)
    assert {module.training for module in model.modules()} == {was_trained}
    assert any(p.requires_grad for name, p in model.named_parameters() if ".second." in name) == trainable


@pytest.mark.parametrize("was_trained", [True, False])
def test_a_further_adapter_leaves_frozen_layers_in_evaluation_mode(tmp_path, was_trained):
    adapted_model().save_pretrained(tmp_path)
    model = load_adapter(make_model(), tmp_path, trainable=True).train(was_trained)
    layer = model.base_model.model.model.layers[0].train(not was_trained)
    modes = {name: module.training for name, module in model.named_modules()}
    load_adapter(model, tmp_path, name="second")
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert layer.self_attn.q_proj.lora_A.second.training != was_trained


def test_llava(tmp_path):
    adapted = adapt(symphonize(make_llava(), decay=DECAY)).eval()
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(make_llava(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_base_with_a_graph_of_its_own_keeps_it(tmp_path):
    base = move_graphs(symphonize(make_model(), decay=DECAY))
    before = logits(base)
    base.save_pretrained(tmp_path / "base")
    adapted = adapt(base)
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), wanted)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)


def test_what_is_beside_an_adapter(tmp_path):
    model = make_model("mixtral")
    model.name_or_path = "some/base"
    adapted = peft.get_peft_model(symphonize(model, decay=DECAY, strength=0.5), lora_config(model, router="train"))
    with pytest.warns(UserWarning, match="some/base"):  # PEFT looks for it, to know whether embeddings were resized
        adapted.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "symphony_config.json").read_text())
    assert record["format"] == 1
    assert record["router"] == "train"
    assert (record["base_model"], record["model_type"]) == ("some/base", "mixtral")
    assert record["routers"] == {f"model.layers.{n}.mlp.gate": {"num_experts": 6, "top_k": 2} for n in range(3)}
    assert record["symphony"]["strength"] == 0.5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["symphony"] == record["symphony"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_save_that_is_broken_off_leaves_no_config_that_peft_would_load(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapted_model().save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_transformers_own_integration_saves_and_loads_it(tmp_path, native_adapters):
    model = symphonize(make_model(), decay=DECAY)
    torch.manual_seed(0)
    model.add_adapter(lora_config(model, init_lora_weights=False))
    move_graphs_of_adapter(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.json")) == [
        "adapter_config.json",
        "generation_config.json",
        "symphony_config.json",
    ]
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), wanted)


def move_graphs_of_adapter(model):
    for module in model.modules():
        if "modules_to_save" in module._modules:
            graph = module.modules_to_save["default"]
            values = torch.rand(graph.num_experts, graph.num_experts)
            with torch.no_grad():
                graph.adjacency.copy_(values + values.T)


def test_an_adapter_without_a_record_is_refused(saved):
    (saved / "symphony_config.json").unlink()
    refuses(make_model(), saved, ConfigError, r"no symphony_config\.json")


def test_an_adapter_without_graphs_gets_no_record(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], inference_mode=True)
    adapted = peft.get_peft_model(symphonize(make_model()), config)
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "symphony_config.json").exists()


def test_a_graph_outside_the_adapter_is_warned_about_in_training(tmp_path):
    """An adapter that was saved without graphs is trained on as it is."""
    peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    base = symphonize(make_model(), z_loss_weight=0, balance_loss_weight=0)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    update_graphs(adapted)
    ids = make_ids()
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    with pytest.warns(SymphonyWarning, match="not saved with the adapter.*lora_config"):
        update_graphs(adapted)


def train_a_step(model):
    ids = make_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    update_graphs(model)


@pytest.mark.parametrize("first", ["no adapter", "an adapter with its graphs"])
def test_a_later_adapter_without_the_graphs_is_warned_about(first, tmp_path):
    """One that was added, or made active, after the first update."""
    peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = symphonize(make_model(), z_loss_weight=0, balance_loss_weight=0)
    if first == "no adapter":
        train_a_step(model)
        model = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    else:
        model = peft.get_peft_model(model, lora_config(model))
        model.load_adapter(tmp_path, "later", is_trainable=True)
        train_a_step(model)  # without a warning: the active adapter has its graphs
        model.set_adapter("later")
    with pytest.warns(SymphonyWarning, match="not saved with the adapter.*lora_config"):
        train_a_step(model)


@pytest.mark.filterwarnings("ignore")  # of the tiny model
def test_a_later_adapter_without_the_bias_is_refused_at_each_update():
    model = symphonize(tiny_model("glm4_moe"), balance="bias")
    train_a_step(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for _ in range(2):
        with pytest.raises(PatchError, match=r"is not in the adapter.*router='train'"):
            train_a_step(adapted)


PROMPTS = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
}


def prompts(kind, **settings):
    return PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=4, **settings)


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_which_hold_no_graphs_are_warned_about(kind, tmp_path):
    model = symphonize(make_model(), decay=DECAY)
    with pytest.warns(SymphonyWarning, match=rf"{kind} has no place for the graphs.*not saved.*lora_config"):
        adapted = peft.get_peft_model(model, prompts(kind))
    with pytest.warns(SymphonyWarning, match=f"{kind} has no place"):
        adapted.add_adapter("second", prompts(kind))
    with pytest.raises(PatchError, match=rf"{kind} has no place for .*correction bias.*balance='loss'"):
        peft.get_peft_model(symphonize(tiny_model("glm4_moe"), balance="bias"), prompts(kind))


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_whose_training_moves_nothing_else_are_not_warned_about(kind, tmp_path):
    adapted = peft.get_peft_model(make_model(), prompts(kind))  # without graphs
    adapted.save_pretrained(tmp_path)
    move_graphs(symphonize(make_model())).save_pretrained(tmp_path / "symphony")
    peft.PeftModel.from_pretrained(symphonize(make_model()), tmp_path)  # not to train it
    peft.get_peft_model(symphonize(make_model(), graph=str(tmp_path / "symphony"), decay=1), prompts(kind))


@pytest.mark.parametrize("named", [None, ["lm_head"]])
def test_a_new_adapter_of_a_symphony_model_holds_the_graphs(named, tmp_path):
    """As TRL's scripts make one with `--use_peft`."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=named, init_lora_weights=False)
    adapted = peft.get_peft_model(symphonize(make_model(), decay=DECAY), config)
    ids, before = make_ids(), expert_graphs(adapted)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    update_graphs(adapted)
    assert all(not torch.equal(graph, before[name]) for name, graph in expert_graphs(adapted).items())
    adapted.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), logits(adapted))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(make_model()))


# PEFT's own loader, and why there is one of ours.


def test_pefts_own_loader_refuses_what_does_not_fit(tmp_path):
    adapted_model().save_pretrained(tmp_path)
    for base, message in (
        (symphonize(make_model(), decay=DECAY, strength=0.5), "strength 0.5, not 1.0"),
        (make_model("mixtral"), "for a model of type olmoe, not mixtral"),
        (make_model(seed=1), r"`adapter_config\.json: symphony_hf\.record`.*delete `base_weights` there"),
    ):
        plain = not is_symphonized(base)
        with pytest.raises(ConfigError, match=message):
            peft.PeftModel.from_pretrained(base, tmp_path)
        assert is_symphonized(base) != plain
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    del values["symphony_hf"]["record"]["base_weights"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    peft.PeftModel.from_pretrained(make_model(seed=1), tmp_path)


def test_pefts_own_loader_refuses_a_graph_with_impossible_values(tmp_path):
    adapted_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("symphony.adjacency"))
    tensors[name][0, 1] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"symphony\..*adjacency is not usable: 1 non-finite entries"):
        peft.PeftModel.from_pretrained(make_model(), tmp_path)


def test_a_second_adapter_through_pefts_own_loader(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        move_graphs(adapted_model(), seed=seed).save_pretrained(tmp_path / name)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(load_adapter(make_model(), tmp_path / name)))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_adapter(make_model(), tmp_path / "again" / "two")), logits(loaded))


def test_an_adapter_of_format_1_through_pefts_own_loader(tmp_path):
    adapted = adapted_model()
    adapted.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values |= values.pop("symphony_hf")["replaced"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make_model(), tmp_path)), logits(adapted))


def test_plain_peft_loses_the_lora_of_some_families(tmp_path):
    """Where a release of PEFT does not, `restore_adapter` is not needed any more."""
    from symphony_hf.experiments.conformance.specimen import Specimen

    specimen = Specimen("deepseek_ocr2")
    adapted = adapt(specimen.symphonized(decay=DECAY)).eval()
    adapted.save_pretrained(tmp_path)
    fresh = peft.get_peft_model(specimen.symphonized(decay=DECAY), lora_config(adapted.get_base_model(), r=4))
    assert fresh.load_adapter(tmp_path, "default").unexpected_keys
    restore_adapter(fresh, tmp_path)
    assert torch.equal(specimen.logits(fresh), specimen.logits(adapted))


# What does not fit.


@pytest.fixture
def saved(tmp_path):
    adapted_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_another_base(saved):
    refuses(make_model("mixtral"), saved, ConfigError, "for a model of type olmoe, not mixtral")
    refuses(make_model(num_hidden_layers=2), saved, ConfigError, "3 routers.*the model has 2 routers")
    refuses(make_model(num_experts=4), saved, ConfigError, "top-3 of 8 experts; the model has.*top-3 of 4")
    refuses(make_model(num_experts_per_tok=2), saved, ConfigError, "top-3 of 8 experts; the model has.*top-2 of 8")


def test_an_error_of_any_kind_leaves_the_base_plain(saved, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loading, "check_base", fail)
    refuses(make_model(), saved, RuntimeError, "out of memory")


def test_another_width_is_refused_before_numbers_are_written(saved):
    refuses(make_model(hidden_size=64), saved, ConfigError, "another shape")


def test_other_settings(saved):
    model = symphonize(make_model(), strength=0.5, decay=DECAY)
    refuses(model, saved, ConfigError, r"other settings.*strength 0\.5, not 1\.0: load it onto the plain base")


def test_numbers_of_other_settings(saved):
    model = symphonize(make_model(), strength=0.5, decay=DECAY)
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    with pytest.raises(ConfigError, match=r"strength 0\.5, not 1\.0: symphonize the model with the adapter's settings"):
        restore_adapter(adapted, saved)


@pytest.mark.parametrize("load", [load_adapter, lambda model, folder, name: model.load_adapter(folder, name)])
@pytest.mark.parametrize(("first", "second"), [("train", "graph"), ("graph", "train")])
def test_an_adapter_of_the_other_mode(tmp_path, first, second, load):
    adapted_model(router=second).save_pretrained(tmp_path)
    model = adapted_model(router=first)
    before = logits(model)
    with pytest.raises(ConfigError, match=f"router='{second}', but the model's adapter `default` has router='{first}'"):
        load(model, tmp_path, name="second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def gathered(model, **settings):
    """Return copies, as PEFT does of a sharded model."""
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, **settings).items()}


def test_tensors_that_are_not_the_models_own(saved, monkeypatch):
    adapted = peft.get_peft_model(model := symphonize(make_model(), decay=DECAY), lora_config(model, r=4))
    monkeypatch.setattr(peft, "get_peft_model_state_dict", gathered)
    with pytest.raises(PatchError, match=r"would be lost.*sharded.*merge_and_unload"):
        restore_adapter(adapted, saved)
    monkeypatch.undo()
    adapted.base_model.model.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(PatchError, match=r"2 tensors of the adapter .*q_proj\.lora_A"):
        restore_adapter(adapted, saved)


def two_tensor(parameter):
    """Return a parameter without a storage of its own, such as those of torchao and DTensor."""
    return torch.nn.Parameter(TwoTensor(parameter.detach(), parameter.detach().clone()), requires_grad=False)


def test_weights_of_tensor_subclasses(tmp_path):
    adapted_model(router="train").save_pretrained(tmp_path)
    model = make_model()
    for module in (model.model.norm, model.model.layers[0].self_attn.q_proj):
        module.weight = two_tensor(module.weight)
    loaded = load_adapter(model, tmp_path)
    assert torch.equal(logits(loaded).a, logits(load_adapter(make_model(), tmp_path)))
    gate = loaded.base_model.model.model.layers[0].mlp.gate.modules_to_save.default
    gate.weight = two_tensor(gate.weight)
    with pytest.raises(PatchError, match=r"1 tensors of the adapter .*gate\.weight"):
        restore_adapter(loaded, tmp_path)
    model = make_model()
    model.model.layers[1].mlp.gate.weight = two_tensor(model.model.layers[1].mlp.gate.weight)
    refuses(model, tmp_path, PatchError, r"1 tensors of the adapter .*layers\.1\.mlp\.gate\.weight")


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_target_that_is_offloaded(saved, has_adapter):
    model = load_adapter(make_model(), saved) if has_adapter else make_model()
    before = logits(model)
    cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        message = r"24 tensors of the adapter .*layers\.0\.self_attn.* would be lost.*offloaded"
        refuses(model, saved, PatchError, message, name="second")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp.gate"])
def test_what_the_adapter_leaves_may_be_offloaded(saved, part):
    model = make_model()
    cpu_offload(model.get_submodule(part), execution_device="cpu")
    assert torch.equal(logits(load_adapter(model, saved)), logits(load_adapter(make_model(), saved)))


def test_a_model_that_is_sharded(saved, monkeypatch):
    adapted = adapted_model()
    monkeypatch.setattr("transformers.PreTrainedModel.tp_size", 2)
    refuses(make_model(), saved, PatchError, "tensor parallelism shards over 2 processes")
    with pytest.raises(PatchError, match="tensor parallelism shards over 2 processes"):
        restore_adapter(adapted, saved)


def test_an_adapter_of_the_hub(saved, monkeypatch):
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(saved / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = load_adapter(make_model(), "someone/adapter", revision="v1")
    assert torch.equal(logits(loaded), logits(load_adapter(make_model(), saved)))
    names = ("symphony_config.json", "adapter_config.json", "adapter_model.safetensors")
    assert asked == [("someone/adapter", name, "v1") for name in names]


def test_a_second_adapter_needs_a_name(saved):
    loaded = load_adapter(make_model(), saved)
    refuses(loaded, saved, PatchError, "give another name=")


def test_a_graph_that_is_missing_or_none(saved):
    weights = load_file(saved / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("symphony.adjacency"))
    broken = {key: value for key, value in weights.items() if key != name}
    save_file(broken, saved / "adapter_model.safetensors")
    refuses(make_model(), saved, GraphError, r"layers\.\d\.mlp\.gate: missing")
    save_file(weights | {name: -weights[name]}, saved / "adapter_model.safetensors")
    refuses(make_model(), saved, GraphError, "negative")
    graphless = {key: value for key, value in weights.items() if "symphony" not in key}
    save_file(graphless, saved / "adapter_model.safetensors")
    refuses(make_model(), saved, GraphError, "holds no expert graph")


def test_lora_that_is_missing(saved):
    weights = load_file(saved / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    del weights[name]
    save_file(weights, saved / "adapter_model.safetensors")
    refuses(make_model(), saved, ConfigError, r"1 tensors of the adapter.*lora_A")


def test_a_pickle_is_not_read(saved):
    torch.save({}, saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    refuses(make_model(), saved, ConfigError, "nothing but safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2.*upgrade"),
        ({"format": "one"}, "`format`"),
        ({"router": "both"}, "`router` is 'both'"),
        ({"routers": {}}, "`routers` is empty"),
        ({"routers": {"a": {"num_experts": "many", "top_k": 2}}}, "routers"),
        ({"routers": None}, "routers"),
        ({"symphony": {"strength": 7}}, "strength"),
        ({"symphony": None}, "symphony"),
        ({"symphony": {"format": 9}}, "format 9"),
        ({"symphony": {"graph": "/somewhere"}}, r"`graph` is '/somewhere'.*takes a path"),
        ({"graphs": 1}, "unknown setting `graphs`"),
        ({"model_type": 3}, "model_type|not olmoe"),
    ],
)
def test_a_record_that_cannot_be_read(saved, change, message):
    file = saved / "symphony_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refuses(make_model(), saved, ConfigError, message)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null", '"x"'])
def test_a_record_that_is_none(saved, text):
    (saved / "symphony_config.json").write_text(text)
    refuses(make_model(), saved, ConfigError, r"symphony_config\.json")


def test_a_folder_that_is_not_there(tmp_path):
    refuses(make_model(), tmp_path / "nothing", ConfigError, "is not a folder")
    shutil.rmtree(tmp_path)
    refuses(make_model(), tmp_path, ConfigError, "is not a folder")
