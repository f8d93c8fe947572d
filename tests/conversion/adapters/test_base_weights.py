"""An adapter's record distinguishes its base model's weights from others, in whatever form they are loaded."""

import json
import warnings

import pytest
import torch
from adapted import DECAY, adapt, adapted_model, logits, refuses
from models import make_model
from torch import nn

from symphony_hf import ConfigError, SymphonyWarning, load_adapter, symphonize
from symphony_hf.conversion.adapters.base_weights import check_base, sample_weights
from symphony_hf.conversion.adapters.record import kept_record

EMBEDDING = "model.embed_tokens.weight"
ROUTERS = ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]


@pytest.fixture(scope="module", params=["graph", "train"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted_model(router=request.param).save_pretrained(folder)
    return folder


def test_the_record_has_weights_of_the_base_and_not_of_the_adapter(saved):
    record = json.loads((saved / "symphony_config.json").read_text())
    assert record["format"] == 1
    assert record["base_weights"].keys() == {EMBEDDING, *(f"{name}.weight" for name in ROUTERS)}
    second = adapt(load_adapter(make_model(), saved), "second", router=record["router"])
    assert kept_record(second.peft_config["second"]).base_weights == record["base_weights"]


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: symphonize(model, decay=DECAY)])
def test_weights_of_another_seed_are_refused(saved, prepare):
    refuses(
        prepare(make_model(seed=1)),
        saved,
        ConfigError,
        r"symphony_config\.json`: the adapter .* other weights: load that one, or, .* delete `base_weights`",
    )


def test_another_dense_model_that_was_upcycled_with_the_same_seed_is_refused(saved):
    """Its routers are the same."""
    base = make_model()
    with torch.no_grad():
        base.model.embed_tokens.weight.copy_(make_model(seed=1).model.embed_tokens.weight)
    refuses(base, saved, ConfigError, "other weights")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_the_same_base(saved, dtype):
    load_adapter(make_model().to(dtype), saved)


def test_quantized_weights_are_the_same_base(saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config), saved)


def test_a_resized_embedding_is_the_same_base(saved):
    base = make_model()
    base.resize_token_embeddings(base.config.vocab_size + 10)
    load_adapter(base, saved)


def test_a_base_that_was_trained_further_is_warned_about(saved):
    base = make_model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    with pytest.warns(SymphonyWarning, match=r"weights differ by \d+\.\d% .* load the base model") as caught:
        load_adapter(base, saved)
    assert [warning.category for warning in caught].count(SymphonyWarning) == 1


def test_a_record_of_an_earlier_version_loads_silently(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((saved / "symphony_config.json").read_text())
    del record["base_weights"]
    (tmp_path / "symphony_config.json").write_text(json.dumps(record))
    load_adapter(make_model(seed=1), tmp_path)


def partitioned(model):
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)


def flattened(model):
    for name, parameter in list(model.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, nn.Parameter(parameter.detach().flatten()))


@pytest.mark.parametrize(
    "change", [lambda model: model.to("meta"), partitioned, flattened], ids=["offloaded", "ZeRO-3", "FSDP"]
)
def test_weights_that_are_not_there_as_a_whole_are_not_compared(saved, change):
    record = json.loads((saved / "symphony_config.json").read_text())
    model = make_model(seed=1)
    change(model)
    sampled = sample_weights(model, ROUTERS)
    assert sampled == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base(record["base_weights"], sampled, saved)


def test_an_offloaded_base_is_compared_by_what_is_in_memory(saved):
    base = make_model()
    base.model.embed_tokens.to("meta")
    assert len(sample_weights(base, ROUTERS)) == 2
    other = make_model(seed=1)
    other.model.embed_tokens.to("meta")
    with pytest.raises(ConfigError, match="other weights"):
        check_base(sample_weights(make_model(), ROUTERS), sample_weights(other, ROUTERS), saved)


def test_an_accepted_base_computes_what_the_adapters_own_did(saved):
    record = json.loads((saved / "symphony_config.json").read_text())
    assert torch.equal(logits(load_adapter(make_model(), saved)), logits(adapted_model(router=record["router"])))
