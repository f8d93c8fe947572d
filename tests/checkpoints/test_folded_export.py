"""Folded checkpoints: files beside them, shards, tokenizers, and the command `symphony fold`."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import make_config, make_ids, make_llava, make_model, move_graphs
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DbrxConfig,
    DeepseekV3Config,
)
from typer.testing import CliRunner
from visual import make_processor

from symphony_hf import ConfigError, FoldError, SymphonyWarning, export_folded, is_symphonized, symphonize
from symphony_hf.cli import app
from symphony_hf.conversion.push import fold_checkpoint
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.files import clear
from symphony_hf.patching.engines import FIXED, Needed, engine_warnings


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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


STEPS = {"os.mkdir", "os.link", "os.rename", "shutil.rmtree", "os.rmdir"}


def export_until(step, model, folder):
    """Export in a process of its own that is killed before one of its steps; return its exit code."""

    def work():
        steps = itertools.count(1)

        def note(event, arguments):
            if event in STEPS and str(arguments[0]).startswith(str(folder.parent)) and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(note)
        export_folded(model, folder)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_killed_at_any_step_it_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    model = move_graphs(symphonize(make_model(num_hidden_layers=1)))
    folder, stored = tmp_path / "work" / "plain", tmp_path / "old"
    make_model(seed=1, num_hidden_layers=1).save_pretrained(stored, max_shard_size="40KB")
    (stored / "notes.txt").write_text("precious")
    old, new, found = contents(stored), None, []
    for step in itertools.count(1):
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(stored, folder)
        code = export_until(step, model, folder)
        clear(folder)  # as the next export does
        found.append(contents(folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    new = found[-1]
    assert set(new) == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert len(found) > 5
    assert old in found
    assert all(state in (old, new) for state in found)
    assert [path.name for path in folder.parent.iterdir()] == ["plain"]


@pytest.mark.parametrize("size", ["5 apples", "", "0GB", "-5GB", "infGB", 0, True, None])
def test_a_size_that_is_none_is_refused_before_the_model_is_loaded(size, tmp_path):
    for attempt in (
        lambda: fold_checkpoint(tmp_path / "nowhere", tmp_path / "plain", max_shard_size=size),
        lambda: export_folded(make_model(), tmp_path / "plain", max_shard_size=size),
    ):
        with pytest.raises(ConfigError, match="`max_shard_size` must be a number of bytes from 1 on, or a size such"):
            attempt()


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
    assert "give `tokenizer=`" in said[0]


def test_a_processor_that_cannot_be_loaded_does_not_replace_another(tmp_path, monkeypatch):
    tokenizer = train_tokenizer([SimpleNamespace(text="the cat sat on the mat")], vocab_size=300)
    for name in ("symphony", "plain"):
        make_processor(tokenizer).save_pretrained(tmp_path / name)
    before, said = contents(tmp_path / "plain"), []
    symphonize(make_llava()).save_pretrained(tmp_path / "symphony")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "symphony")

    def load(*_, **__):
        raise ImportError("it needs PIL")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    monkeypatch.setattr(logging.getLogger("symphony_hf.patching.folding"), "warning", said.append)
    export_folded(model, tmp_path / "plain")
    assert ["no processor is written (it needs PIL)" in text for text in said] == [True]
    assert contents(tmp_path / "plain").items() >= before.items()
    assert "processor_config.json" in before


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


def test_settings_that_engines_ignore_are_said(tmp_path):
    known = "vLLM 0.32.0 and llama.cpp (llama-cpp-python 0.3.36)"
    with pytest.warns(SymphonyWarning, match="`norm_topk_prob` of this `olmoe` is True, and always False in") as said:
        export_folded(symphonize(make_model("olmoe", norm_topk_prob=True)), tmp_path)
    assert [known in str(warning.message) for warning in said] == [True]
    shared = {"shared_expert_intermediate_size": 0, "qkv_bias": False}
    texts = engine_warnings(make_config("qwen2_moe", norm_topk_prob=True, mlp_only_layers=[0], **shared))
    assert [text.split("`")[1] for text in texts] == [
        "shared_expert_intermediate_size",
        "qkv_bias",
        "mlp_only_layers",
        "norm_topk_prob",
    ]
    assert [known in text for text in texts] == [True, False, False, False]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_a_model_that_engines_compute_right_is_written_without_a_warning(family, tmp_path):
    settings = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_folded(symphonize(make_model(family, **settings)), tmp_path)


def test_windows_in_some_layers_are_said():
    window = {"use_sliding_window": True, "sliding_window": 4}
    texts = [engine_warnings(make_config("qwen2_moe", max_window_layers=layers, **window)) for layers in (0, 2)]
    vllm, llama_cpp = (
        "differs between layers, and is the same for all in vLLM",
        "`sliding_window` of this `qwen2_moe` is 4, and always None in",
    )
    assert [any(vllm in text for text in some) for some in texts] == [False, True]
    assert all(any(llama_cpp in text for text in some) for some in texts)


def test_the_text_part_and_sub_configs_are_read():
    llava = make_llava("mixtral").config
    llava.text_config.sliding_window = 4
    assert [text.split("`")[1] for text in engine_warnings(llava)] == ["sliding_window"]
    dbrx = DbrxConfig()
    assert engine_warnings(dbrx) == []
    dbrx.ffn_config.moe_normalize_expert_weights = None
    assert [text.split("`")[1] for text in engine_warnings(dbrx)] == ["ffn_config.moe_normalize_expert_weights"]


def test_settings_that_transformers_does_not_write_are_said_where_they_are_missing():
    texts = engine_warnings(DeepseekV3Config())
    assert [text.split("`")[1] for text in texts] == ["scoring_func", "topk_method"]
    assert engine_warnings(DeepseekV3Config(scoring_func="sigmoid", topk_method="noaux_tc")) == []


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="some settings came later")
def test_every_entry_is_of_a_setting_that_its_family_has():
    for families in FIXED.values():
        for family, settings in families.items():
            for name, value in settings.items():
                config = CONFIG_MAPPING[family]()
                *parents, last = name.split(".")
                for parent in parents:
                    config = getattr(config, parent)
                assert hasattr(config, last) != isinstance(value, Needed), (family, name)
