"""One of the two processes of test_training.py, in a module of its own that a spawned process can import."""

import peft
import torch
from loop_ranks import RANKS, STEPS, Record, engine_loop, join, make, micro_batch, sgd
from models import make_ids
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from symphony_hf import SymphonyCallback, expert_graphs, lora_config, update_graphs


def make_adapted(router="train", experts=True):
    """Return the model of the loops with an adapter in which all that can be trained is trained."""
    model = make()
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora_config(model, router=router, experts=experts, r=4)).train()


def ddp_loop(model, rank):
    wrapped, optimizer, record = DistributedDataParallel(model), sgd(model), Record(model)
    update_graphs(model)
    for step in range(STEPS):
        wrapped(**micro_batch(step, rank)).loss.backward()
        record.gradients()
        optimizer.step()
        optimizer.zero_grad()
        update_graphs(wrapped)
        record.graphs()
    return record.tensors


def run(rank, folder):
    with join(rank, RANKS, folder):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be built, which takes minutes
        model = make_adapted()
        save_file(ddp_loop(model, rank), folder / f"ddp.{rank}.st")
        if rank == 0:
            model.save_pretrained(folder / "ddp")
        for stage in (2, 3):
            model = make_adapted()
            save_file(engine_loop(model, 1, stage, rank), folder / f"zero{stage}.{rank}.st")
        trainer_with_zero3(folder / "trainer", rank)


def trainer_with_zero3(folder, rank):
    """Train as users do; Trainer gathers the weights that it saves."""
    config = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 2,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        deepspeed=config,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=2,
        optim="sgd",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 8)]
    model = make_adapted()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()])
    trainer.train()
    assert trainer.model_wrapped.zero_optimization_stage() == 3
    if rank == 0:
        save_file(expert_graphs(model), folder / "graphs.st")
