"""Folded checkpoints: files beside them, shards, tokenizers, and the command `symphony fold`."""

import logging
from types import SimpleNamespace

import pytest
import torch
from models import make_ids, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from symphony_hf import ConfigError, FoldError, export_folded, is_symphonized, symphonize
from symphony_hf.cli import app
from symphony_hf.data.tokenizer import train_tokenizer


def test_files_of_the_user_are_kept(tmp_path):
    model = symphonize(make_model())
    others = [
        "model-ema.safetensors",
        "model_best_so_far.safetensors",
        "model.safetensors.bak",
        "model_vae.safetensors",
    ]
    for name in others:
        (tmp_path / name).write_text("precious")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-0*"))) > 1
    export_folded(model, tmp_path)
    assert all((tmp_path / name).read_text() == "precious" for name in others)
    assert not list(tmp_path.glob("model-0*"))
    assert not is_symphonized(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_an_adapters_folder_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FoldError, match="holds an adapter"):
        export_folded(symphonize(make_model()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_shards_have_the_size_that_was_asked_for(tmp_path):
    model = symphonize(make_model())
    export_folded(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-0*"))) > 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(make_ids()).logits, model(make_ids()).logits)


@pytest.fixture
def loaded(tmp_path):
    symphonize(make_model()).save_pretrained(tmp_path / "symphony")
    train_tokenizer([SimpleNamespace(text="the cat sat on the mat")], vocab_size=300).save_pretrained(
        tmp_path / "symphony"
    )
    return AutoModelForCausalLM.from_pretrained(tmp_path / "symphony")


def test_the_tokenizer_beside_the_weights_comes_along(loaded, tmp_path):
    export_folded(loaded, tmp_path / "plain")
    wanted, found = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("symphony", "plain"))
    assert found("the cat")["input_ids"] == wanted("the cat")["input_ids"]
    export_folded(loaded, tmp_path / "bare", tokenizer=False)
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def test_a_tokenizer_that_is_not_found_is_said_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("symphony_hf.patching.folding"), "warning", said.append)
    export_folded(symphonize(make_model()), tmp_path)
    assert len(said) == 1
    assert "pass tokenizer=" in said[0]


def test_the_command(loaded, tmp_path):
    words = ["fold", str(tmp_path / "symphony"), str(tmp_path / "plain"), "--max_shard_size", "40KB"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(make_ids()).logits, loaded(make_ids()).logits)
    assert (tmp_path / "plain" / "tokenizer.json").exists()
    refusals = [
        ("symphony", "symphony", "another folder"),
        ("plain", "x", "not a Symphony"),
        ("no", "x", "not a folder"),
    ]
    for source, output, message in refusals:
        refused = CliRunner().invoke(app, ["fold", str(tmp_path / source), str(tmp_path / output)])
        assert isinstance(refused.exception, ConfigError)
        assert message in str(refused.exception)
