"""What one of several processes does in test_final_loss.py: a module of its own, which a spawned process can import."""

import json
import os
from types import SimpleNamespace

from models import make_ids, make_model
from transformers import TrainingArguments

from symphony_hf.data.blocks import NO_LABEL, PadCollator
from symphony_hf.data.prepared import PreparedData
from symphony_hf.experiments.distributed.loops import local_group
from symphony_hf.training.final_evaluation import measure
from symphony_hf.training.trainer import ResumableTrainer

LENGTH = 12


def answered_rows(*answered):
    """Return rows of which the given numbers of last tokens are in the loss."""
    rows = []
    for number, num_answered in enumerate(answered):
        ids = make_ids(1, LENGTH, seed=number)[0].tolist()
        rows.append({"input_ids": ids, "labels": [NO_LABEL] * (LENGTH - num_answered) + ids[LENGTH - num_answered :]})
    return rows


def final_loss(folder, rows, batch_size=1):
    """Return the final loss of a model on rows, and the one that is logged."""
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=batch_size
    )
    trainer = ResumableTrainer(make_model("olmoe"), arguments, data_collator=PadCollator(0))
    data = PreparedData("chat", train=rows, test=rows, collator=PadCollator(0))
    found = measure(SimpleNamespace(), trainer, None, data)
    assert trainer._sums is None  # later evaluations are Trainer's own
    return found["loss"], trainer.state.log_history[-1]["test_loss"]


def run_rank(rank, num_ranks, folder, rows):
    """Write the losses on one process of several."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    with local_group(rank, num_ranks, folder / "rendezvous"):
        (folder / f"{rank}.json").write_text(json.dumps(final_loss(folder, rows)))
