"""Twenty thousand steps: the graph stays valid, and neither memory nor the disk fills up."""

import gc
import resource
import sys
from pathlib import Path

import pytest
import torch
from models import make_ids, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from symphony_hf import SymphonyCallback, expert_graphs, symphonize
from symphony_hf.patching.symphonize import symphony_routers

STEPS, EVERY = 20_000, 2_000


def resident_megabytes():
    """Return the present resident memory, or the peak if the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / (2**20 if sys.platform == "darwin" else 2**10)


def num_tensors():
    """Count the tensors that Python holds: one more per step is too little to show in the memory of the process."""
    gc.collect()
    # By type: `isinstance` asks objects for their class, and torch's deprecated ones warn.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


class Notes(TrainerCallback):
    def __init__(self):
        self.memory, self.tensors, self.graphs = [], [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % EVERY == 0:
            self.memory.append(resident_megabytes())
            self.tensors.append(num_tensors() - len(self.graphs))
            self.graphs.append(list(expert_graphs(model).values()))
            for _, router in symphony_routers(model):
                rows = router.symphony.transition().sum(-1)
                torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(900)
def test_twenty_thousand_steps(tmp_path):
    small = {
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_experts": 4,
    }
    model = symphonize(make_model("olmoe", num_experts_per_tok=2, **small))
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(64, 6)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=EVERY,
        save_total_limit=2,
        logging_steps=500,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    notes = Notes()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback(), notes])
    trainer.train()
    for graphs in notes.graphs:
        for graph in graphs:
            assert torch.isfinite(graph).all()
            assert (graph >= 0).all()
            # Sums of the same numbers in the same order on both sides of the diagonal.
            assert torch.equal(graph, graph.T)
    assert len(notes.memory) == STEPS // EVERY
    # Past the first steps, in which caches fill, within what the allocator keeps by chance.
    assert notes.memory[-1] - notes.memory[1] < 0.05 * notes.memory[1]
    # A few at the most, that are freed at another moment of a step.
    assert max(notes.tensors[1:]) - min(notes.tensors[1:]) < 50
    assert int(model.model.layers[0].mlp.gate.symphony.updates) == STEPS
    folders = sorted(folder.name for folder in tmp_path.iterdir())
    assert folders == [f"checkpoint-{STEPS - EVERY}", f"checkpoint-{STEPS}"]
    losses = [record["symphony/balance_loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == STEPS // 500
    assert all(loss > 0 for loss in losses)
