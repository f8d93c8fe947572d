"""The WikiText model against loops, in its forms; read in blocks, generated from, saved, and with graphs."""

import logging
from unittest import mock

import pytest
import torch
from naive import forward
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import find_labels

from symphony_hf import ConfigError, expert_graphs, fold, symphonize, update_graphs
from symphony_hf.models.wikitext import vocabulary
from symphony_hf.models.wikitext.configuration import CACHE_NAMES, WikiTextMoeConfig
from symphony_hf.models.wikitext.modeling import WikiTextMoeForCausalLM

FORMS = {
    "SMoE": {},
    "XMoE": {"router_type": "cosine"},
    "GLaM": {"moe_every": 2},
    "MomentumSMoE": {"momentum": 0.7},
    "Momentum XMoE": {"momentum": 0.7, "momentum_step": 0.5, "router_type": "cosine"},
}
TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "attention_span": 6,
    "num_experts": 4,
}


def make(form="SMoE", **more):
    torch.manual_seed(0)
    model = WikiTextMoeForCausalLM(WikiTextMoeConfig(**{**TINY, **FORMS[form], **more})).eval()
    with torch.no_grad():  # published initialization leaves experts near zero, which no test would notice
        for name, parameter in model.named_parameters():
            if "experts" in name or "norm" in name:
                parameter.normal_(std=0.5)
    return model


def words(rows=1, length=11, seed=0):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def memory_of(output):
    return next(output[name] for name in output if name in CACHE_NAMES)


def test_the_published_sizes():
    with torch.device("meta"):
        model = WikiTextMoeForCausalLM(WikiTextMoeConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 215_679_863


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_it_computes_what_loops_do(form, implementation):
    model = make(form)
    model.config._experts_implementation = implementation
    ids = words()
    logits = model(ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits, forward(model, ids[0]), atol=1e-5, rtol=1e-5)


def test_where_the_experts_are():
    assert [layer.moe is not None for layer in make("GLaM").model.layers] == [True, False, True]
    assert all(layer.moe is not None for layer in make().model.layers)


@pytest.mark.parametrize("form", ["SMoE", "GLaM"])
@pytest.mark.parametrize("with_grad", [True, False], ids=["training's memory", "the cache"])
def test_blocks_with_memory_are_the_whole_stream(form, with_grad):
    """Also where the stream is longer than the span: a position sees the span before it in either way."""
    model, ids = make(form), words(rows=2, length=24)
    with torch.set_grad_enabled(with_grad):
        whole, memory, parts = model(ids, use_cache=False).logits, None, []
        for block in ids.split([8, 5, 11], dim=1):
            output = model(block, cache=memory, use_cache=True)
            memory = memory_of(output)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_row_that_begins_anew_forgets():
    model, first, second = make(), words(rows=2, seed=1), words(rows=2, seed=2)
    memory = memory_of(model(first, use_cache=True))
    logits = model(second, cache=memory, continues=torch.tensor([True, False])).logits
    alone = model(second, use_cache=False).logits
    torch.testing.assert_close(logits[1], alone[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], alone[0], atol=1e-3)


def test_gradients_end_at_the_block():
    model = make().train()
    memory = memory_of(model(words(seed=1), use_cache=True))
    assert all(not states.requires_grad for states in memory.states)


@torch.no_grad()
def test_padding_is_nothing():
    model, ids = make(), words(length=7)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    logits = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["SMoE", "XMoE"])
def test_generation_computes_the_logits_of_whole_forwards(form):
    """By the argmax alone, a model that ignores its memory could pass."""
    model, ids = make(form), words(length=5)
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(ids, max_new_tokens=9, **settings)
    with torch.no_grad():
        whole = model(generated.sequences, use_cache=False).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(generated.sequences[:, 5:], whole.argmax(-1))


def test_the_memory_has_the_name_that_this_version_of_transformers_gives_it():
    """Its own outputs and models must not need the other name, which a version with both logs as deprecated."""
    model, ids = make(), words()
    with mock.patch.object(logging.getLogger("transformers.utils.generic"), "warning") as warning:
        output = model(ids, use_cache=True)
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert not warning.called
    assert [name for name in output if name in CACHE_NAMES] == [name for name in ALL_CACHE_NAMES if name in CACHE_NAMES]


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_the_memory_is_taken_by_either_name(name):
    model, ids = make(), words(length=9)
    memory = memory_of(model(ids[:, :6], use_cache=True))
    logits = model(ids[:, 6:], **{name: memory}).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_it_comes_back_by_the_auto_classes(form, tmp_path):
    model = make(form)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(words()).logits, model(words()).logits)


def test_the_loss_is_the_cross_entropy_of_the_next_words():
    model, ids = make(), words(rows=2)
    labels = ids.clone()
    labels[0, 4] = -100
    loss = model(ids, labels=labels, use_cache=False).loss
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) < len(list(model.parameters()))  # a norm of each block is in the published count alone
    got, reference = (torch.autograd.grad(value, list(trained.values())) for value in (loss, wanted))
    for name, a, b in zip(trained, got, reference, strict=True):
        # Sums over words and tokens in another order.
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_trainer_evaluates_it(tmp_path):
    """It asks of each batch all labels that the forward has arguments for."""
    assert find_labels(WikiTextMoeForCausalLM) == ["labels"]
    model, ids = make(), words(4, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    found = Trainer(model.eval(), arguments, eval_dataset=rows).evaluate()["eval_loss"]
    # Float32 sums in another order.
    assert found == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_loss_without_gradients_makes_none(off, monkeypatch):
    model, ids = make(), words(rows=2)
    labels = ids.clone()
    labels[0, 4] = -100
    wanted = model(ids, labels=labels, use_cache=False).loss
    monkeypatch.setattr(vocabulary, "_SummedNll", None)  # which would fill a gradient of the size of the weights
    with off():
        loss = model(ids, labels=labels, use_cache=False).loss
        assert model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=1, use_cache=False).loss == 0
    torch.testing.assert_close(loss, wanted)
    frozen = model.requires_grad_(False)
    torch.testing.assert_close(frozen(ids, labels=labels, use_cache=False).loss, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_the_symphony_form_of_each(form, tmp_path):
    model, ids = make(form), words(rows=3, length=20)
    plain = model(ids, use_cache=False).logits
    symphonize(model, decay=0.5)
    assert len(expert_graphs(model)) == (2 if form == "GLaM" else 3)
    assert torch.equal(model(ids, use_cache=False).logits, plain)  # a graph begins as the identity
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert update_graphs(model)
    model.eval()
    moved = model(ids, use_cache=False).logits
    assert not torch.equal(moved, plain)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids, use_cache=False).logits, moved)
    # Float32 sums of another order: the router smooths its logits, the folded one multiplies by A W.
    torch.testing.assert_close(fold(model)(ids, use_cache=False).logits, moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 5}, "more than the 4 experts"),
        ({"hidden_size": 15}, "not divisible by 2 heads"),
        ({"router_type": "cosin"}, "did you mean `cosine`"),
        ({"momentum": 1.5}, "`momentum` must be from 0 to below 1"),
        ({"attention_span": 0}, "`attention_span` must be an integer of at least 1"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` is True, .* set it to false"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        WikiTextMoeConfig(**{**TINY, **settings})
