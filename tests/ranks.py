"""What one of two processes does in test_distributed.py: a module of its own, which a spawned process can import."""

import torch
import torch.distributed as dist
from models import gradients, make_ids, make_model
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from symphony_hf import expert_graphs, symphonize, update_graphs

STEPS = 3


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    reduces = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reduces.append(args[1:]) or original(*args, **kwargs)
    model = symphonize(make_model(), balance_loss_weight=0.0, decay=0.9).train()
    update_graphs(model)
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        ids = make_ids(4, 8, seed=step)[2 * rank : 2 * rank + 2]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        assert update_graphs(wrapped)
    # One for all layers, each step; and, every hundred steps from the first on, a look at whether the ranks agree.
    assert reduces == [(dist.ReduceOp.MAX,), *[()] * STEPS]
    save_file({**expert_graphs(model), **{f"grad.{n}": g for n, g in gradients(model).items()}}, folder / f"{rank}.st")
    dist.destroy_process_group()
