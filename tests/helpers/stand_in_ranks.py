"""What one of two processes does in data/test_stand_in.py: a module of its own, which a spawned process can import."""

import importlib.util
import os

import torch
from models import gradients
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from visual import make_model

from symphony_hf import expert_graphs, symphonize, update_graphs
from symphony_hf.experiments.distributed.loops import local_group

UNUSED = ("encoder.layers.1.", "post_layernorm")
STRATEGIES = ("ddp", "zero2", "zero3") if importlib.util.find_spec("deepspeed") else ("ddp",)


def prepare_model(processor):
    """A symphonized LLaVA. What comes after the vision layer that it looks at never runs, so it is not trained."""
    model = symphonize(make_model(processor), decay=0.9, balance_loss_weight=0, z_loss_weight=0).train()
    for name, parameter in model.named_parameters():
        if any(part in name for part in UNUSED):
            parameter.requires_grad_(False)
    return model


def step_ddp(model, batch):
    """Graphs and gradients after one step; it raises where a parameter of one rank has no gradient."""
    wrapped = DistributedDataParallel(model)
    wrapped(**batch).loss.backward()
    update_graphs(wrapped)
    wrapped(**batch)  # only now the reducer tells whether all parameters were there
    return gradients(model)


def step_zero(model, batch, stage):
    """Likewise under ZeRO, where the ranks gather weights and reduce gradients one by one, each waiting for all."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be built, which takes minutes
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.backward(engine(**batch).loss)
    found = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters() if p.requires_grad}
    engine.step()
    update_graphs(engine)
    engine.destroy()
    return found


def run_rank(rank, folder, processor):
    torch.set_num_threads(1)
    for name, number in (("RANK", rank), ("WORLD_SIZE", 2)):
        os.environ |= {name: str(number), f"LOCAL_{name}": str(number)}
    with local_group(rank, 2, folder / "rendezvous"):
        batch = load_file(folder / f"batch{rank}.st")
        for strategy in STRATEGIES:
            model = prepare_model(processor)
            found = step_ddp(model, batch) if strategy == "ddp" else step_zero(model, batch, int(strategy[-1]))
            tensors = {**expert_graphs(model), **{f"grad.{name}": gradient for name, gradient in found.items()}}
            save_file(tensors, folder / f"{strategy}.{rank}.st")
