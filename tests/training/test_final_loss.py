"""The loss of a finished run is of the tokens, however they are put into batches and processes."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from loss_ranks import answered_rows, final_loss, run_rank
from models import make_model
from trainers import ARGUMENTS, ROWS, tiny_tokenizer
from transformers import TrainingArguments

from symphony_hf import symphonize
from symphony_hf.data.blocks import NO_LABEL, PadCollator
from symphony_hf.data.prepared import PreparedData
from symphony_hf.errors import EvaluationError
from symphony_hf.training import token_loss
from symphony_hf.training.final_evaluation import measure
from symphony_hf.training.fit import train
from symphony_hf.training.token_loss import summed_losses


def mean_over_tokens(rows, model=None):
    model, losses = make_model("olmoe") if model is None else model.eval(), []
    for row in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, t] for i, t in enumerate(row["labels"]) if t != NO_LABEL]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_the_mean_over_tokens(batch_size, tmp_path):
    rows = answered_rows(1, 9, 2, 5, 1)
    # float32 logits of padded batches, in sums of another order.
    expected = pytest.approx(mean_over_tokens(rows), rel=1e-5)
    assert final_loss(tmp_path, rows, batch_size) == (expected, expected)


class WithoutFloat64(torch.Tensor):
    """Stands in for a tensor of an accelerator that has no float64, such as Apple's."""

    def double(self):
        raise TypeError("no float64 on this device")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_loss_needs_no_float64_of_the_device(tmp_path, monkeypatch):
    rows, (expected, _) = answered_rows(1, 9, 2), final_loss(tmp_path, answered_rows(1, 9, 2))
    monkeypatch.setattr(token_loss, "summed_losses", lambda *given: summed_losses(*given).as_subclass(WithoutFloat64))
    assert final_loss(tmp_path, rows) == (expected, expected)


def test_rows_without_a_label_have_no_loss(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "symphony_hf"):
        loss, logged = final_loss(tmp_path, answered_rows(0, 0))
    assert math.isnan(loss)
    assert math.isnan(logged)
    assert "no token of the test split has a label" in caplog.text


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("settings", "config"),
    [({"label_smoothing_factor": 0.3}, {}), ({}, {"output_router_logits": True, "router_aux_loss_coef": 1.0})],
    ids=["label smoothing", "the model's own balance loss"],
)
def test_the_loss_is_not_what_training_minimizes(graph, settings, config, tmp_path):
    rows, model = answered_rows(1, 9, 2, 5), make_model("olmoe", **config)
    if graph:
        symphonize(model)
    arguments = TrainingArguments(str(tmp_path), **{**ARGUMENTS, "max_steps": 1, **settings})
    trainer = train(model, rows, rows, arguments, collator=PadCollator(0))
    found = measure(SimpleNamespace(), trainer, None, PreparedData("chat", train=rows, validation=rows))
    # float32 logits of padded batches, in sums of another order.
    assert found["loss"] == pytest.approx(mean_over_tokens(rows, trainer.model), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    if settings or not graph:
        assert trainer.evaluate()["eval_loss"] > found["loss"] + 0.01


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # TRL's, about label smoothing
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.3},
        {"router_aux_loss_coef": 1.0},
        {"padding_free": True, "max_length": None},
    ],
    ids=str,
)
def test_the_loss_of_conversations_is_not_what_trl_minimizes(settings, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig

    model, data = make_model("olmoe"), Dataset.from_dict({"input_ids": ROWS})
    arguments = SFTConfig(str(tmp_path), **{**ARGUMENTS, "max_steps": 1, **settings})
    trainer = train(model, data, data, arguments, processor=tiny_tokenizer())
    found = measure(SimpleNamespace(), trainer, None, PreparedData("chat", train=data, test=data))
    rows = [{"input_ids": row, "labels": [NO_LABEL, *row[1:]]} for row in ROWS]
    # As above.
    assert found["loss"] == pytest.approx(mean_over_tokens(rows, trainer.model), rel=1e-5)


LOGITS = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", ["labels", "shift_labels", "encoder_decoder"])
def test_labels_are_those_of_the_next_token_unless_they_are_shifted(layout, monkeypatch):
    """In chunks, which do not end with the row."""
    monkeypatch.setattr(token_loss, "_CHUNK", 4)
    seen = []

    def model(**inputs):
        seen.append(set(inputs))
        return SimpleNamespace(logits=LOGITS)

    labels = torch.arange(14).view(2, 7) % 11
    labels[0, 3:5] = NO_LABEL
    batch = {"input_ids": labels, "labels": labels, "skip_logits": True}  # Liger's
    if layout == "shift_labels":
        batch["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
    found = summed_losses(model, batch, layout == "encoder_decoder")
    step = 0 if layout == "encoder_decoder" else 1
    log_probs, expected = LOGITS.log_softmax(-1), []
    for row in range(2):
        own = [-log_probs[row, i - step, labels[row, i]] for i in range(step, 7) if labels[row, i] != NO_LABEL]
        expected.append([sum(own), len(own)])
    torch.testing.assert_close(found, torch.tensor(expected))
    assert seen == [{"input_ids"} | ({"labels"} if layout == "encoder_decoder" else set())]


@pytest.mark.parametrize(("logits", "got"), [(None, "none"), (LOGITS[:, 0], r"\(2, 11\)")])
def test_a_model_without_logits_for_each_label_is_refused(logits, got):
    batch = {"labels": torch.zeros(2, 7, dtype=torch.int64)}
    with pytest.raises(EvaluationError, match=rf"logits for each label, of shape \(2, 7\) .*; got {got}: evaluate"):
        summed_losses(lambda **inputs: SimpleNamespace(logits=logits), batch)


@pytest.mark.slow
@pytest.mark.parametrize("answered", [(1, 9, 0, 4), (1, 9, 0, 4, 6)], ids=["even", "uneven"])
def test_several_processes_have_the_same_loss(answered, tmp_path):
    """Each has batches of its own numbers of tokens; one batch has none, and one row may fill up the last batch."""
    rows = answered_rows(*answered)
    torch.multiprocessing.spawn(run_rank, (2, tmp_path, rows), nprocs=2)
    expected = pytest.approx(mean_over_tokens(rows), rel=1e-5)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected, expected]
