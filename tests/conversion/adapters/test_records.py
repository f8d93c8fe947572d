"""A new adapter's record and graphs are those of the model that it is put into, whichever config it is made of."""

import copy
import json

import peft
import pytest
import torch
from adapted import DECAY, adapted_model, logits
from models import make_model, move_graphs
from safetensors.torch import load_file

from symphony_hf import (
    ConfigError,
    SymphonyWarning,
    expert_graphs,
    load_adapter,
    lora_config,
    symphonize,
)
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.symphonize import symphony_routers


def own_config(**settings):
    return peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings)


def record_of(folder):
    return json.loads((folder / "symphony_config.json").read_text())


@pytest.mark.parametrize("make_config", [lambda _: own_config(), lora_config], ids=["LoraConfig", "lora_config"])
def test_one_config_for_two_models(tmp_path, make_config):
    bases = {name: symphonize(make_model(), decay=DECAY, strength=float(name)) for name in ("0.25", "1.0")}
    config = make_config(bases["0.25"])
    for name, base in bases.items():
        adapted = move_graphs(peft.get_peft_model(base, config))
        adapted.save_pretrained(tmp_path / name)
        assert record_of(tmp_path / name)["symphony"]["strength"] == float(name)
        assert torch.equal(logits(load_adapter(make_model(), tmp_path / name)), logits(adapted))


def test_a_config_that_was_used_for_a_symphony_model_is_unchanged(tmp_path):
    config = own_config()
    peft.get_peft_model(symphonize(make_model()), config)
    assert config.modules_to_save is None
    peft.get_peft_model(make_model(), config).save_pretrained(tmp_path)
    assert not (tmp_path / "symphony_config.json").exists()


def test_a_config_of_a_symphony_model_for_a_plain_one(tmp_path):
    config = lora_config(symphonize(make_model()))
    with pytest.warns(SymphonyWarning, match="has no graphs.*symphonize"):
        adapted = peft.get_peft_model(make_model(), config)
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "symphony_config.json").exists()
    assert logits(peft.PeftModel.from_pretrained(make_model(), tmp_path)).equal(logits(adapted))


@pytest.mark.parametrize(("named", "mode"), [("symphony", "graph"), ("gate", "train")])
def test_a_config_that_names_the_graphs_itself(tmp_path, named, mode):
    adapted = peft.get_peft_model(symphonize(make_model(), decay=DECAY), own_config(modules_to_save=[named]))
    move_graphs(adapted).save_pretrained(tmp_path)
    assert record_of(tmp_path)["router"] == mode
    for loaded in (load_adapter(make_model(), tmp_path), peft.PeftModel.from_pretrained(make_model(), tmp_path)):
        assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize("named", [["layers.0.mlp.gate"], ["layers.1.mlp.gate.symphony"], ["0.mlp.gate", "2.mlp.gate"]])
def test_a_config_that_names_some_routers_gets_the_graphs_of_the_others(tmp_path, named):
    adapted = peft.get_peft_model(symphonize(make_model(), decay=DECAY), own_config(modules_to_save=named))
    move_graphs(adapted).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith(".symphony.adjacency") for name in stored) == 3
    weights = [name for name in stored if name.endswith("mlp.gate.weight")]
    assert len(weights) == sum("symphony" not in name for name in named)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), logits(adapted))


@pytest.mark.parametrize("entry", ["mlp.gate.weight", "weight", "model.layers.1.mlp.gate.weight"])
@pytest.mark.parametrize("named", [None, ["symphony"], ["gate"]])
def test_a_config_with_lora_on_a_routers_weight_is_refused(entry, named):
    model = symphonize(make_model())
    kinds = [type(module) for module in model.modules()]
    message = rf"`target_parameters`: '{entry}' .*`model\.layers\..\.mlp\.gate`.*lora_config\(model, router='train'\)"
    with pytest.raises(ConfigError, match=message):
        peft.get_peft_model(model, own_config(target_parameters=[entry], modules_to_save=named))
    assert [type(module) for module in model.modules()] == kinds


def test_a_config_that_repeats_layers_is_refused():
    model = symphonize(make_model())
    with pytest.raises(ConfigError, match=r"`layer_replication` is \[\[0, 2\], \[1, 3\]\].*leave it out"):
        peft.get_peft_model(model, own_config(layer_replication=[[0, 2], [1, 3]]))
    assert len(model.model.layers) == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("loads", [False, True])
def test_a_copy_of_a_config_saves_its_own_values(tmp_path, copied, loads):
    base = symphonize(make_model(), decay=DECAY)
    config = lora_config(base, r=4, init_lora_weights=False)
    if loads:
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "first")
        base = make_model()
        config = load_adapter(make_model(), tmp_path / "first").peft_config["default"]
    wider = copied(config)
    wider.r = 8
    adapted = move_graphs(peft.get_peft_model(base, wider))
    adapted.save_pretrained(tmp_path / "second")
    wider.save_pretrained(tmp_path / "config")
    config.save_pretrained(tmp_path / "unchanged")
    for folder, rank in (("second", 8), ("config", 8), ("unchanged", 4)):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["r"] == rank
    assert torch.equal(logits(load_adapter(make_model(), tmp_path / "second")), logits(adapted))


def test_a_weighted_adapter_has_a_record(tmp_path):
    adapted = adapted_model()
    adapted.add_weighted_adapter(["default"], [0.5], "weaker")
    adapted.set_adapter("weaker")
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path / "weaker")), logits(adapted))


def test_the_config_of_a_loaded_adapter_for_another_model(tmp_path):
    adapted_model().save_pretrained(tmp_path)
    config = load_adapter(make_model(), tmp_path).peft_config["default"]
    with pytest.raises(ConfigError, match=r"strength 0\.5, not 1\.0"):
        peft.get_peft_model(symphonize(make_model(), decay=DECAY, strength=0.5), config)


# The copy of an adapter that TRL makes for reference.


def copied_as_trl_does(model):
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("router", ["graph", "train"])
@pytest.mark.parametrize("loads", [False, True])
def test_a_reference_adapter_routes_as_the_adapter_it_is_of(tmp_path, router, loads):
    model = adapted_model(router=router)
    wanted, graphs = logits(model), list(expert_graphs(model).values())
    if loads:
        model.save_pretrained(tmp_path)
        model = load_adapter(make_model(), tmp_path, trainable=True)
    copied_as_trl_does(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), wanted)
    assert all(map(torch.equal, expert_graphs(model).values(), graphs))
    with torch.no_grad():
        for _, router in symphony_routers(model):
            active_graph(router.symphony).adjacency.add_(1)
    model.set_adapter("default")  # which keeps its own
    assert torch.equal(logits(model), wanted)


def test_a_second_adapter_of_the_same_settings_begins_with_the_bases_graph():
    model = symphonize(make_model(), decay=DECAY)
    config = own_config()
    adapted = peft.get_peft_model(model, config)
    base = expert_graphs(adapted)
    move_graphs(adapted)
    adapted.add_adapter("second", config)
    adapted.set_adapter("second")
    assert all(torch.equal(graph, base[name]) for name, graph in expert_graphs(adapted).items())
