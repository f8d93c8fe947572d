"""Perplexity by document, against a loop over windows without batches or padding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, make_model

from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.batching import padded_batches
from symphony_hf.evaluation.perplexity import DocumentScores, score_documents, score_stream

# One float32 rounding is 6e-8 of a value. A window sums a few hundred of them, and a padded batch goes through
# another attention kernel than a window alone; 1e-5 leaves room for both and for nothing else.
ROUNDING = 1e-5
LENGTHS = {"short": [2], "two windows": [16, 5], "long": [16, 16, 16, 9], "middle": [11]}


@pytest.fixture(scope="module")
def model():
    return make_model("olmoe")


@pytest.fixture
def windows():
    return {name: [torch.randint(VOCAB, (n,)) for n in lengths] for name, lengths in LENGTHS.items()}


class TableModel(torch.nn.Module):
    """The logits of the next token are a row of a table, chosen by the token: what they are worth is known."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.inner = torch.nn.Linear(1, 1)

    def forward(self, input_ids, attention_mask):
        self.seen = SimpleNamespace(inference=torch.is_inference_mode_enabled(), training=self.training)
        return SimpleNamespace(logits=self.table[input_ids])


def naive_nll(model, window):
    with torch.no_grad():
        log_probabilities = model(input_ids=window.unsqueeze(0)).logits[0].double().log_softmax(-1)
    return -sum(float(log_probabilities[t, window[t + 1]]) for t in range(len(window) - 1))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_equal_a_loop_over_single_windows(model, windows, batch_size):
    scores = score_documents(model, windows, batch_size=batch_size)
    expected = [sum(naive_nll(model, window) for window in parts) for parts in windows.values()]
    assert scores.names == list(windows)
    np.testing.assert_allclose(scores.nll, expected, rtol=ROUNDING)
    np.testing.assert_array_equal(scores.num_tokens, [sum(n - 1 for n in lengths) for lengths in LENGTHS.values()])


@pytest.mark.thorough
@settings(deadline=None, derandomize=True, max_examples=25)
@given(length=st.integers(2, 40), block_size=st.integers(2, 12), data=st.data())
def test_a_stream_scores_each_token_once_after_the_tokens_before_it(model, length, block_size, data):
    context = data.draw(st.integers(1, block_size - 1))
    ids = torch.arange(length) * 7 % VOCAB
    scores = score_stream(model, ids, block_size=block_size, context=context, batch_size=3)
    assert scores.num_tokens.sum() == length - 1
    expected, place = [], 1
    while place < length:  # a window begins with the last tokens that were scored, as many as the context has
        start = 0 if place == 1 else place - context
        window = ids[start : start + block_size]
        seen = window[: place - start]
        # All tokens of the window, less those that were scored before.
        before = naive_nll(model, seen) if len(seen) > 1 else 0.0
        expected.append(naive_nll(model, window) - before)
        place = start + len(window)
    assert scores.nll.tolist() == pytest.approx(expected, rel=ROUNDING, abs=1e-4)


def test_padding_changes_nothing_where_it_would_be_the_likeliest_token(windows):
    """Token 0 pads. A model that always expects it would gain from every padded place that was counted."""
    table = torch.zeros(VOCAB, VOCAB)
    table[:, 0] = 10.0
    windows = {name: [window.clamp_min(1) for window in parts] for name, parts in windows.items()}
    scores = score_documents(TableModel(table), windows, batch_size=16)
    per_token = np.log(np.exp(10.0) + VOCAB - 1)
    np.testing.assert_allclose(scores.nll, scores.num_tokens * per_token, rtol=ROUNDING)


def test_even_logits_have_the_vocabulary_as_perplexity(windows):
    assert score_documents(TableModel(torch.zeros(VOCAB, VOCAB)), windows).perplexity == pytest.approx(VOCAB)


def test_perplexity_weighs_documents_by_their_tokens():
    scores = DocumentScores(["a", "b"], np.array([2.0, 30.0]), np.array([2, 6]))
    assert scores.perplexity == pytest.approx(np.exp(32 / 8))


def test_half_precision_logits_are_scored_in_float32():
    table = torch.randn(VOCAB, VOCAB).bfloat16()
    window = torch.randint(VOCAB, (200,))
    expected = torch.nn.functional.cross_entropy(table[window[:-1]].double(), window[1:], reduction="sum")
    scores = score_documents(TableModel(table), {"a": [window]})
    assert scores.nll[0] == pytest.approx(float(expected), rel=ROUNDING)


@pytest.mark.parametrize("training", [True, False])
def test_every_module_gets_its_own_mode_back(windows, training):
    model = TableModel(torch.zeros(VOCAB, VOCAB)).train(training)
    model.inner.train(not training)
    score_documents(model, windows)
    assert model.training is training
    assert model.inner.training is not training
    assert not model.seen.training
    assert model.seen.inference


def test_modes_come_back_after_an_error():
    model = TableModel(torch.full((VOCAB, VOCAB), torch.nan)).train()
    with pytest.raises(EvaluationError):
        score_documents(model, {"a": [torch.arange(3)]})
    assert model.training


def test_a_score_that_is_not_finite_names_its_document(windows):
    table = torch.zeros(VOCAB, VOCAB)
    table[7] = torch.nan
    windows = {name: [window.clamp_min(8) for window in parts] for name, parts in windows.items()}
    windows["middle"][0][4] = 7
    with pytest.raises(EvaluationError, match=r"'middle'.*nan"):
        score_documents(TableModel(table), windows)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ({}, "no documents"),
        ({"a": []}, "'a' has no windows"),
        ({"a": [torch.tensor([1])]}, "'a'.*at least 2"),
        ({"a": [torch.ones(2, 2, dtype=torch.int64)]}, r"'a'.*\(2, 2\)"),
        ({"a": [torch.ones(5)]}, "'a'.*float32"),
    ],
)
def test_unusable_windows_are_refused(windows, message):
    with pytest.raises(EvaluationError, match=message):
        score_documents(TableModel(torch.zeros(VOCAB, VOCAB)), windows)


def test_batch_size_must_be_positive(windows):
    with pytest.raises(EvaluationError, match=r"`batch_size`.*0"):
        score_documents(TableModel(torch.zeros(VOCAB, VOCAB)), windows, batch_size=0)


@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=20), batch_size=st.integers(1, 6))
def test_batches_hold_every_window_once_behind_its_mask(lengths, batch_size):
    flat = [torch.full((length,), number + 1) for number, length in enumerate(lengths)]
    seen = []
    for indices, input_ids, attention_mask in padded_batches(flat, batch_size, torch.device("cpu"), None):
        assert len(indices) <= batch_size
        seen.extend(indices)
        for index, ids, mask in zip(indices, input_ids, attention_mask, strict=True):
            assert torch.equal(ids[mask.bool()], flat[index])
            assert torch.equal(mask, (torch.arange(len(ids)) < lengths[index]).long())
    assert sorted(seen) == list(range(len(lengths)))
