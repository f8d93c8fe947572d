"""Two real processes over gloo: every rank ends with the graph of the union of their batches."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from models import gradients, make_ids, make_model
from ranks import STEPS, run_rank
from safetensors.torch import load_file

from symphony_hf import expert_graphs, symphonize, update_graphs

pytestmark = pytest.mark.slow


def test_the_ranks_graphs_are_those_of_the_union_batch(tmp_path):
    mp.spawn(run_rank, (tmp_path,), nprocs=2)
    for rank in range(2):
        (message,) = json.loads((tmp_path / f"{rank}.json").read_text())
        assert message.startswith("1 of 3 graphs differ between the ranks")
    ranks = [load_file(tmp_path / f"{rank}.st") for rank in range(2)]
    model = symphonize(make_model(), balance_loss_weight=0.0, decay=0.9).train()
    update_graphs(model)
    for step in range(STEPS):
        ids = make_ids(4, 8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        update_graphs(model)
    for name, graph in expert_graphs(model).items():
        # Counts are integers, which sum exactly in any order, so the graphs are equal to the bit.
        assert torch.equal(ranks[0][name], graph)
        assert torch.equal(ranks[1][name], graph)
    for name, gradient in gradients(model).items():
        for rank in ranks:
            torch.testing.assert_close(rank[f"grad.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)
