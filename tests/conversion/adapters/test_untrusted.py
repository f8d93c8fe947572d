"""Untrusted PEFT configs are refused with our own errors, before the model is touched."""

import json
import sys

import peft
import pytest
import torch
from adapted import DECAY, adapted_model, logits, refuses
from models import make_model, move_graphs

from symphony_hf import ConfigError, load_adapter, lora_config, symphonize
from symphony_hf.experiments.fuzzing.campaign import MemoryPeak

CONFIG = "adapter_config.json"


@pytest.fixture
def saved(tmp_path):
    adapted_model(router="train").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": None}, r"`peft_type` is None: only LORA, LOHA, LOKR, IA3"),
        ({"peft_type": [1]}, "`peft_type`"),
        ({"peft_type": "XLORA", "adapters": {"a": "elsewhere"}}, "`peft_type` is 'XLORA'"),  # loads them
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "`peft_type`"),  # loads a state, a pickle at need
        ({"megatron_config": {}, "megatron_core": "this"}, "`megatron_config`.*not loaded"),  # imports it
        ({"monteclora_config": {"num_samples": 10**9}}, "`monteclora_config`.*not loaded"),
        ({"r": 3}, "another shape"),
        ({"r": -1}, "no adapter can be made of it"),
        ({"r": "16"}, "no adapter can be made of it"),
        ({"r": float("inf")}, "no adapter can be made of it"),
        ({"bias": 3}, "no adapter can be made of it"),
        ({"init_lora_weights": "nonsense"}, "no adapter can be made of it"),
        ({"arrow_config": 0.5}, "no adapter can be made of it"),
        ({"target_modules": ["k_proj"]}, "have no place"),
        ({"target_modules": None}, "no adapter can be made of it|have no place"),
        ({"target_modules": []}, "no adapter can be made of it|have no place"),
        ({"modules_to_save": ["gate", "embed_tokens"]}, "are missing"),
        ({"layer_replication": [[0, 3], [0, 3]]}, "are missing"),
    ],
)
def test_what_a_config_may_not_ask_for(saved, values, message):
    edit(saved, **values)
    refuses(make_model(), saved, ConfigError, message)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{", b'{"a":' * 100_000, b" " * (8 * 2**20 + 1)])
def test_a_config_that_is_none(saved, content):
    (saved / CONFIG).write_bytes(content)
    refuses(make_model(), saved, ConfigError, CONFIG)


def test_a_config_that_is_missing(saved):
    (saved / CONFIG).unlink()
    refuses(make_model(), saved, ConfigError, r"adapter_config\.json` is missing")


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r"(.+)+[qkv]_proj!"},
        {"exclude_modules": r"(.*)*!"},
        {"rank_pattern": {r".*.*.*.*.*.*.*.*!": 4}},
        {"alpha_pattern": {r"(\w{1,9}){1,99}!": 4}},
        {"target_modules": ".?" * 40 + "!"},
        {"target_modules": "(.|.)" * 40 + "!"},
    ],
)
def test_a_pattern_that_would_be_matched_for_ever(saved, values):
    edit(saved, **values)
    refuses(make_model(), saved, ConfigError, "may take forever")


def test_patterns_that_people_write_are_taken(tmp_path):
    model = symphonize(make_model(), decay=DECAY)
    settings = {"rank_pattern": {r"layers\.[01]\..*q_proj": 2}, "init_lora_weights": False}
    config = peft.LoraConfig(target_modules=r".*\.(q|v)_proj", modules_to_save=["symphony"], **settings)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), logits(adapted))


def test_a_rank_that_is_not_there_is_not_allocated(saved):
    edit(saved, r=2**22)  # 128 MiB a matrix
    model = make_model()
    refuses(model, saved, ConfigError, "another shape")
    with pytest.raises(ConfigError, match="another shape"), MemoryPeak() as memory:
        load_adapter(model, saved)
    assert memory.taken < 2**25 or sys.platform != "linux"


def test_tensors_that_cannot_be_read_or_named(saved, monkeypatch):
    monkeypatch.setattr(peft, "get_peft_model_state_dict", lambda *_, **__: {}["bias"])
    refuses(make_model(), saved, ConfigError, "no adapter can be made of it: KeyError")


def test_a_second_adapter_that_is_refused_leaves_the_first(saved):
    model = load_adapter(make_model(), saved)
    before = logits(model)
    edit(saved, r=3)
    refuses(model, saved, ConfigError, "another shape", name="second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (peft.IA3Config, {"feedforward_modules": [], "init_ia3_weights": False}),
        (peft.LoHaConfig, {"r": 2, "init_weights": False}),
        (peft.LoKrConfig, {"r": 2, "init_weights": False}),
    ],
)
def test_other_kinds_of_adapters_with_graphs(tmp_path, kind, settings):
    model = symphonize(make_model(), decay=DECAY)
    config = kind(target_modules=["k_proj", "v_proj"], modules_to_save=["symphony"], **settings)
    adapted = move_graphs(peft.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), logits(adapted))


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", [peft.IA3Config, peft.LoHaConfig, peft.LoKrConfig])
def test_other_kinds_of_adapters_in_bfloat16(tmp_path, kind, wide):
    """They have the type that they were trained in."""
    settings = {"feedforward_modules": [], "init_ia3_weights": False} if kind is peft.IA3Config else {"r": 2}
    settings |= {"init_weights": False} if kind is not peft.IA3Config else {}
    config = kind(target_modules=["v_proj"], **settings)
    base = symphonize(make_model(dtype=torch.bfloat16), decay=DECAY)
    adapted = move_graphs(peft.get_peft_model(base, config, autocast_adapter_dtype=wide))
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(make_model(dtype=torch.bfloat16), tmp_path)
    dtypes = {p.dtype for name, p in loaded.named_parameters() if "v_proj." in name and "base_layer" not in name}
    assert dtypes == {torch.float32 if wide else torch.bfloat16}
    assert torch.equal(logits(loaded), logits(adapted))


def test_dora(tmp_path):
    model = symphonize(make_model(), decay=DECAY)
    adapted = peft.get_peft_model(model, lora_config(model, r=4, use_dora=True, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make_model(), tmp_path)), logits(adapted))
