"""Routing kept under attack, against a loop over tokens, layers and single windows that reads the routers' choice."""

import weakref

import numpy as np
import pytest
import torch
from models import VOCAB, make_llava, make_model

from symphony_hf.diagnostics.routing_metrics import flip_rate
from symphony_hf.errors import EvaluationError, UnsupportedModelError
from symphony_hf.evaluation.perplexity import TokenScores, score_tokens
from symphony_hf.evaluation.routing.records import record_routing, routing_stability
from symphony_hf.experiments.conformance.naive import watch_choices
from symphony_hf.experiments.conformance.tiny import tiny_model

TOP_K = 3
BLOCK = 16
GENERIC = VOCAB - 1
"""The token that attacks put in a word's place; clean documents don't have it."""


@pytest.fixture(scope="module")
def model():
    return make_model("olmoe")


def cut(ids):
    return [window for window in torch.tensor(ids).split(BLOCK) if len(window) > 1]


@pytest.fixture
def documents():
    """Each document's clean ids, its attacked ids, and the pairs of positions left alone."""
    made = {}
    for name, length in {"a": 40, "b": 13, "c": 34}.items():
        clean = torch.randperm(VOCAB - 2)[:length].tolist()
        attacked, untouched = [], []
        for position, token in enumerate(clean):
            if position % 7 == 3:
                attacked.extend([GENERIC] * (1 + position % 2))
            else:
                untouched.append((position, len(attacked)))
                attacked.append(token)
        # Where a last window of one token would be dropped, another token keeps it.
        attacked.extend([GENERIC] * (len(attacked) % BLOCK == 1))
        made[name] = (clean, attacked, untouched)
    return made


def windows_of(documents, side):
    return {name: cut(made[side]) for name, made in documents.items()}


def naive_choices(model, windows):
    """The indices that the routers themselves returned: for each layer one set of experts a token."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    layers = [[] for _ in routers]
    for window in windows:
        hooks = [
            router.register_forward_hook(
                lambda _, __, output, chosen=chosen: chosen.extend(map(set, output[2].tolist()))
            )
            for router, chosen in zip(routers, layers, strict=True)
        ]
        with torch.no_grad():
            model(input_ids=window.unsqueeze(0))
        for hook in hooks:
            hook.remove()
    return layers


def test_recorded_routing_is_what_the_routers_chose_in_document_order(model, documents):
    windows = windows_of(documents, 0)
    recorded = record_routing(model, windows, batch_size=4)
    flat = [window for parts in windows.values() for window in parts]
    expected = naive_choices(model, flat)
    num_tokens = sum(len(window) for window in flat)
    for name, layer in zip(recorded, expected, strict=True):
        indices, margin = recorded[name]
        assert indices.dtype == torch.int16
        assert indices.shape == (num_tokens, TOP_K)
        assert torch.equal(indices, indices.sort(-1).values)
        assert [set(token) for token in indices.tolist()] == layer
        assert margin.shape == (num_tokens,)
        assert (margin >= 0).all()  # OLMoE takes the highest; the token of padding has none


def test_the_lm_head_runs_on_one_token_of_a_window(model, documents):
    lengths = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    record_routing(model, windows_of(documents, 0), batch_size=4)
    hook.remove()
    assert set(lengths) == {1}


def test_likelihoods_are_those_of_a_pass_of_their_own(model, documents):
    windows = windows_of(documents, 0)
    scores = TokenScores(windows)
    recorded, alone = record_routing(model, windows, batch_size=4, scores=scores), record_routing(model, windows, 4)
    expected = score_tokens(model, windows, batch_size=4)
    assert list(scores.by_document()) == list(expected) == list(windows)
    assert all(np.array_equal(values, expected[name]) for name, values in scores.by_document().items())
    assert all(map(torch.equal, recorded[name], alone[name]) for name in alone)
    with pytest.raises(EvaluationError, match="`scores` are of other windows"):
        record_routing(model, dict(windows), scores=scores)


@pytest.mark.parametrize("with_scores", [False, True])
def test_no_outputs_live_on_through_the_next_forward(model, documents, with_scores):
    windows = windows_of(documents, 0)
    outputs, alive = [], []
    hooks = [
        model.register_forward_pre_hook(lambda *_: alive.append(sum(output() is not None for output in outputs))),
        model.register_forward_hook(lambda _, args, output: outputs.append(weakref.ref(output.logits))),
    ]
    record_routing(model, windows, batch_size=1, scores=TokenScores(windows) if with_scores else None)
    for hook in hooks:
        hook.remove()
    assert len(alive) > 2
    assert not any(alive)


def test_margins_are_in_document_order(model, documents):
    windows = windows_of(documents, 0)
    recorded = record_routing(model, windows, batch_size=4)
    names = list(recorded)
    gaps = [[] for _ in names]
    for window in (window for parts in windows.values() for window in parts):
        with torch.no_grad():
            logits = model(input_ids=window.unsqueeze(0), output_router_logits=True).router_logits
        for layer, values in zip(gaps, logits, strict=True):
            layer.append(values.topk(TOP_K + 1).values[:, TOP_K - 1 :].diff(dim=1).neg().flatten())
    for name, layer in zip(names, gaps, strict=True):
        # Padded batches sum in another order; logits are of order 10.
        torch.testing.assert_close(recorded[name].margin_T, torch.cat(layer), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_routing_stability_equals_a_loop_over_tokens(model, documents, batch_size):
    kept = routing_stability(model, windows_of(documents, 0), windows_of(documents, 1), batch_size=batch_size)
    shares = np.zeros(3)
    for clean, attacked, untouched in documents.values():
        before, after = naive_choices(model, cut(clean)), naive_choices(model, cut(attacked))
        for layer in range(3):
            shares[layer] += sum(len(before[layer][i] & after[layer][j]) / TOP_K for i, j in untouched)
    num_tokens = sum(len(untouched) for _, _, untouched in documents.values())
    assert kept.num_tokens == num_tokens
    np.testing.assert_allclose(kept.per_layer, shares / num_tokens)
    assert kept.share == pytest.approx(shares.mean() / num_tokens)
    assert kept.share < 1


def test_identical_documents_keep_exactly_everything(model, documents):
    windows = windows_of(documents, 0)
    kept = routing_stability(model, windows, windows, batch_size=3)
    assert kept.share == 1.0
    assert kept.per_layer.tolist() == [1.0, 1.0, 1.0]
    assert kept.num_tokens == sum(len(window) for parts in windows.values() for window in parts)


def test_documents_are_matched_by_name_not_by_order(model, documents):
    clean, attacked = windows_of(documents, 0), windows_of(documents, 1)
    backwards = {name: attacked[name] for name in reversed(attacked)}
    assert routing_stability(model, clean, backwards).share == routing_stability(model, clean, attacked).share


def test_a_nested_language_model_can_be_passed_by_itself(documents):
    model = make_llava("olmoe")
    windows = windows_of(documents, 0)
    recorded = record_routing(model.model.language_model, windows)
    assert len(recorded) == 3
    assert {name: record.indices_TK.shape[1] for name, record in recorded.items()} == dict.fromkeys(recorded, TOP_K)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "dbrx", "openai_privacy_filter", "nllb-moe"])
def test_families_whose_recorded_logits_do_not_say(family):
    """A selection bias and groups; a selection bias; the choice in the block; no recorded logits; two stacks."""
    model = tiny_model(family)
    ids = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(0))
    windows = {"a": list(ids[:26].split(13)), "b": [ids[26:]]}
    recorded = record_routing(model, windows, batch_size=2)
    reached = watch_choices(model)
    flat = [*windows["a"], *windows["b"]]
    for window in flat:
        inputs = {"decoder_input_ids": window[None]} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            model(input_ids=window[None], attention_mask=torch.ones(1, len(window)).long(), **inputs)
    assert recorded.keys() == reached.keys()
    for name, record in recorded.items():
        notes = reached[name][:: len(reached[name]) // len(flat)]  # the router's own, not that of its experts
        assert torch.equal(record.indices_TK.long(), torch.cat(notes).sort(-1).values)


def test_a_dense_model_is_refused(documents):
    with pytest.raises(UnsupportedModelError, match="no router found in Linear"):
        record_routing(torch.nn.Linear(1, 1), windows_of(documents, 0))


def test_routers_that_see_other_tokens_are_refused(model, documents):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            self.model(input_ids[:, ::2], attention_mask[:, ::2])

    with pytest.raises(EvaluationError, match=r"saw 24 tokens, the batch has 48"):
        record_routing(Half(), windows_of(documents, 0), 3)


def test_routers_that_do_not_run_are_refused(model, documents):
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            pass

    with pytest.raises(EvaluationError, match="none of its 3 routers ran"):
        record_routing(Idle(), windows_of(documents, 0))


def test_documents_in_one_text_only_are_refused(model, documents):
    clean, attacked = windows_of(documents, 0), windows_of(documents, 1)
    attacked["other"] = attacked.pop("b")
    with pytest.raises(EvaluationError, match="'b', 'other'"):
        routing_stability(model, clean, attacked)


def test_texts_without_a_common_token_are_refused(model):
    clean, attacked = {"a": [torch.tensor([1, 2, 3])]}, {"a": [torch.tensor([4, 5])]}
    with pytest.raises(EvaluationError, match="tokenized"):
        routing_stability(model, clean, attacked)


def test_flip_rate_by_hand():
    clean = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    attacked = torch.tensor([[1, 0], [3, 8], [0, 1], [6, 7]])
    assert 1 - flip_rate(clean, attacked).mean() == (2 + 1 + 0 + 2) / 8
