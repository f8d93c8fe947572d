"""A Symphony model's config says the same whoever writes it, and never hides a setting of the user's."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from models import gradients, make_ids, make_llava, make_model, move_graphs
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from symphony_hf import (
    SymphonyWarning,
    export_folded,
    is_symphonized,
    load_checkpoint,
    symphonize,
    unsymphonize,
    upcycle_modules,
)
from symphony_hf.checkpoints.folder import open_folder
from symphony_hf.checkpoints.upload import write_card

MODELS = {
    "text": lambda: symphonize(make_model(router_aux_loss_coef=0.5)),
    "vision-language": lambda: symphonize(make_llava()),
    "language model inside": lambda: symphonize(make_llava()).model.language_model,
    "upcycled": lambda: upcycle_modules(make_llava(), "*multi_modal_projector"),
}


def config_in(folder):
    config = json.loads((folder / "config.json").read_text())
    for entry in (config, *(value for value in config.values() if isinstance(value, dict))):
        entry.pop("dtype", None)  # transformers takes it from the weights
        entry.get("symphony_hf", {}).get("replaced", {}).pop("dtype", None)
    return config


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["save_pretrained", "to_json_file"])
def test_a_config_on_its_own_is_written_as_with_its_model(kind, way, tmp_path):
    model = MODELS[kind]()
    if way == "save_pretrained":
        model.config.save_pretrained(tmp_path / "config")
    else:
        (tmp_path / "config").mkdir()
        model.config.to_json_file(tmp_path / "config" / "config.json")
    assert all(not name.startswith("Symphony") for name in model.config.architectures or ())
    assert not hasattr(model.config, "auto_map")
    model.save_pretrained(tmp_path / "model")
    written = config_in(tmp_path / "model")
    assert written["architectures"] == [f"Symphony{type(model).__name__}"]
    expected = written if kind != "upcycled" else written | {"architectures": []}  # no class is named before a save
    assert config_in(tmp_path / "config") == expected
    assert "symphony" in written or "upcycled" in written


def test_a_config_that_was_loaded_without_its_model_stays_marked(tmp_path):
    symphonize(make_model()).save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "config")
    assert config_in(tmp_path / "config") == config_in(tmp_path / "model")


CODE = {"AutoModelForCausalLM": "modeling_mixtral.MixtralForCausalLM"}


def with_code_on_the_hub(folder):
    """Return a model whose config names code beside it, loaded by transformers' own class."""
    make_model("mixtral").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": CODE}))
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_code_that_a_model_does_not_run_is_not_named(tmp_path):
    """Or a push, its card and `load_checkpoint` would refuse what this package wrote."""
    model = symphonize(with_code_on_the_hub(tmp_path / "base"))
    model.config.save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "symphony")
    export_folded(model, tmp_path / "folded", tokenizer=False)
    assert unsymphonize(model).config.auto_map == CODE
    for name in ("config", "symphony", "folded"):
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
    for name in ("symphony", "folded"):
        assert open_folder(tmp_path / name)
        write_card(tmp_path / name, "it")
        assert is_symphonized(load_checkpoint(tmp_path / name)) == (name == "symphony")


def test_a_checkpoint_that_names_such_code_is_saved_without_it(tmp_path):
    symphonize(make_model("mixtral")).save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"auto_map": CODE}))
    AutoModelForCausalLM.from_pretrained(tmp_path / "old", trust_remote_code=False).save_pretrained(tmp_path / "new")
    assert open_folder(tmp_path / "new").kind == "symphony"


class Custom(MixtralForCausalLM):
    """A model with code of its own, as the Auto classes import it from the Hub."""


Custom.register_for_auto_class("AutoModelForCausalLM")


def test_code_that_a_model_runs_is_named(tmp_path):
    model = with_code_on_the_hub(tmp_path / "base")
    symphonize(Custom(model.config)).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    file = Path(__file__)
    assert config["auto_map"] == {"AutoModelForCausalLM": f"{file.stem}.Custom"}
    assert (tmp_path / "saved" / file.name).exists()


def test_a_plain_config_is_not_marked(tmp_path):
    model = make_model()
    before = model.config.to_dict()
    unsymphonize(symphonize(model))
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["architectures"] == ["OlmoeForCausalLM"]


def test_weights_saved_by_accelerate_beside_a_config_saved_on_its_own(tmp_path):
    model, ids = move_graphs(symphonize(make_model("mixtral"))), make_ids()
    Accelerator().save_model(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_symphonized(loaded)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_graphs_whose_settings_were_left_behind_are_named(tmp_path):
    model, ids = move_graphs(symphonize(make_model("mixtral"))), make_ids()
    Accelerator().save_model(model, tmp_path)
    make_model("mixtral").config.save_pretrained(tmp_path)
    with pytest.warns(SymphonyWarning, match=r"has 3 expert graphs \(model\.layers\.0\.\S+, \.\.\.\).*graph=PATH"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_symphonized(loaded)
    symphonize(loaded, graph=str(tmp_path))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_users_own_aux_weight_is_shown_while_ours_replaces_it():
    model, ids = symphonize(make_model(router_aux_loss_coef=0.5)), make_ids()
    plain = make_model()(ids, labels=ids).loss

    def weights():
        return model.config.router_aux_loss_coef, model.router_aux_loss_coef

    assert weights() == (0.5, 0.5)
    assert torch.equal(model(ids, labels=ids, output_router_logits=True).loss, plain)
    assert weights() == (0.5, 0.5)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.25
    assert torch.equal(model(ids, labels=ids, output_router_logits=True).loss, plain)
    by_position = model(ids, None, None, None, None, ids, output_router_logits=True)
    assert torch.equal(by_position.loss, plain)
    assert weights() == (0.25, 0.25)
    with pytest.raises(RuntimeError):
        model(ids.float(), labels=ids)
    assert weights() == (0.25, 0.25)


def test_an_aux_loss_that_the_loop_adds_itself_trains_nothing():
    """TRL's trainers weigh it by the config and add it to a loss of their own."""
    ids = make_ids()
    once, added = (symphonize(make_model(router_aux_loss_coef=0.5)).train() for _ in range(2))
    once(ids, labels=ids).loss.backward()
    output = added(ids, labels=ids, output_router_logits=True)
    assert output.aux_loss == 0
    (output.loss + added.config.router_aux_loss_coef * output.aux_loss).backward()
    for name, gradient in gradients(once).items():
        assert torch.equal(gradients(added)[name], gradient), name
    off = symphonize(make_model(), balance_loss_weight=0.0).train()
    assert off(ids, labels=ids, output_router_logits=True).aux_loss.requires_grad
