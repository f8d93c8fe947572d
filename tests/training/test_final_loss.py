"""The loss of a finished run is of the tokens, however they are put into batches."""

from types import SimpleNamespace

import pytest
import torch
from models import make_ids, make_model
from transformers import TrainingArguments

from symphony_hf.data.blocks import NO_LABEL, PadCollator
from symphony_hf.data.prepared import PreparedData
from symphony_hf.training.final_evaluation import measure
from symphony_hf.training.trainer import ResumableTrainer


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_the_mean_over_tokens(batch_size, tmp_path):
    rows = []
    for number, num_answered in enumerate((1, 9, 2, 5, 1)):
        ids = make_ids(1, 12, seed=number)[0].tolist()
        rows.append({"input_ids": ids, "labels": [NO_LABEL] * (12 - num_answered) + ids[12 - num_answered :]})
    model = make_model("olmoe")
    losses = []
    for row in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, t] for i, t in enumerate(row["labels"]) if t != NO_LABEL]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=batch_size
    )
    trainer = ResumableTrainer(model, arguments, data_collator=PadCollator(0))
    data = PreparedData("chat", train=rows, test=rows, collator=PadCollator(0))
    found = measure(SimpleNamespace(), trainer, None, data)
    # float32 logits of padded batches, in sums of another order.
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert "prediction_step" not in vars(trainer)
