"""Two real processes over gloo: every rank ends with the graph of the union of their batches."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import gradients, make_ids, make_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from symphony_hf import expert_graphs, symphonize, update_graphs

pytestmark = pytest.mark.slow
STEPS = 3


def run_rank(rank, folder):
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    reduces = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reduces.append(1) or original(*args, **kwargs)
    model = symphonize(make_model(), balance_loss_weight=0.0, decay=0.9).train()
    update_graphs(model)
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        ids = make_ids(4, 8, seed=step)[2 * rank : 2 * rank + 2]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        assert update_graphs(wrapped)
    assert len(reduces) == STEPS  # one for all layers, each step
    save_file({**expert_graphs(model), **{f"grad.{n}": g for n, g in gradients(model).items()}}, folder / f"{rank}.st")
    dist.destroy_process_group()


def test_the_ranks_graphs_are_those_of_the_union_batch(tmp_path):
    mp.spawn(run_rank, (tmp_path,), nprocs=2)
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
