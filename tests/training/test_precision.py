"""Weights that are trained in 16 bits without a float32 copy: a warning, and float32 for whole modules of adapters."""

import contextlib

import pytest
import torch
from models import make_ids, make_model
from trainers import Rows
from transformers import Trainer, TrainingArguments

from symphony_hf import SymphonyCallback, is_symphonized, symphonize
from symphony_hf.errors import SymphonyWarning
from symphony_hf.recipe import PeftSection
from symphony_hf.training.models import add_adapters
from symphony_hf.training.precision import keep_steps_precise


def make_trainer(model, folder, **settings):
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_strategy="no", learning_rate=1e-5, lr_scheduler_type="constant",
        per_device_train_batch_size=2, **quiet, **settings,
    )  # fmt: skip
    callbacks = [SymphonyCallback()] if is_symphonized(model) else []
    return Trainer(model, arguments, train_dataset=Rows(make_ids(4, 8)), callbacks=callbacks)


@pytest.mark.parametrize(
    ("dtype", "strategy", "mixed", "warns"),
    [
        (torch.bfloat16, "single", True, True),
        (torch.bfloat16, "ddp", False, True),
        (torch.bfloat16, "zero2", True, False),
        (torch.bfloat16, "fsdp", True, False),
        (torch.bfloat16, "fsdp", False, True),
        (torch.float32, "single", True, False),
    ],
)
def test_weights_in_16_bits_are_warned_about(dtype, strategy, mixed, warns, tmp_path):
    trainer = make_trainer(symphonize(make_model(dtype=dtype)), tmp_path, bf16=mixed)
    warning = pytest.warns(SymphonyWarning, match=r"are in 16 bits.*learning_rate 1e-05.*set `model.dtype: float32`")
    with warning if warns else contextlib.nullcontext():
        keep_steps_precise(trainer, strategy)


def routers_of(model):
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and name.endswith("gate.modules_to_save.default.weight")
    ]


@pytest.mark.parametrize("graph", [False, True])
def test_trained_routers_of_adapters_learn_in_mixed_precision(graph, tmp_path):
    """In bfloat16, a step of 1e-5 would leave nearly all of their weights as they are."""
    model = make_model(dtype=torch.bfloat16)
    model = add_adapters(symphonize(model) if graph else model, PeftSection(router="train", r=2))
    trainer = make_trainer(model, tmp_path, bf16=True)
    keep_steps_precise(trainer, "single")
    before = [router.detach().clone() for router in routers_of(model)]
    assert len(before) == 3
    assert all(router.dtype == torch.float32 for router in before)
    trainer.train()
    assert all((new != old).float().mean() > 0.9 for new, old in zip(routers_of(model), before, strict=True))
    assert trainer.evaluate(Rows(make_ids(2, 8)))["eval_loss"] > 0


def test_without_mixed_precision_they_stay_in_the_dtype_of_the_model(tmp_path):
    model = add_adapters(symphonize(make_model(dtype=torch.bfloat16)), PeftSection(router="train", r=2))
    with pytest.warns(SymphonyWarning, match=r"3 trained weights \(.*gate.*are in 16 bits"):
        keep_steps_precise(make_trainer(model, tmp_path), "single")
    assert all(router.dtype == torch.bfloat16 for router in routers_of(model))
