"""The loops of test_loops.py. Those of several ranks, and DeepSpeed's, run in spawned processes, which import this."""

import contextlib
import functools
import os
import re
import warnings

import torch
from models import make_ids, make_model
from pages import README
from safetensors.torch import save_file

import symphony_hf
from symphony_hf import SymphonyWarning, expert_graphs, symphonize
from symphony_hf.experiments.distributed.loops import local_group
from symphony_hf.patching.symphonize import symphony_routers

SETTINGS = {"balance_loss_weight": 0.5, "z_loss_weight": 0.25, "decay": 0.9}
STEPS = 3
LR = 0.05
RANKS = 2


@functools.cache
def codes_of(loop):
    """The codes of a row of the README's table of loops: what the loops here run is what is written there."""
    (row,) = re.findall(rf"^\| {re.escape(loop)}.*$", README.read_text(encoding="utf-8"), re.M)
    return re.findall(r"`([^`]+)`", row)


def line_of(loop):
    """The one code of a row that names the package."""
    (code,) = (code for code in codes_of(loop) if "symphony_hf." in code)
    return code


def run_line_of(loop, **names):
    """Run it; returns the names as it left them."""
    names["symphony_hf"] = symphony_hf
    exec(compile(line_of(loop), "README.md", "exec"), names)
    return names


def make(**settings):
    """With its own auxiliary loss on, as TRL asks for, so that every loop shows that it is not added."""
    return symphonize(make_model(output_router_logits=True), **{**SETTINGS, **settings}).train()


def assert_same(actual, expected):
    """Graphs to the bit: counts are integers. Gradients and losses to rounding, over three steps of training."""
    missing = {name for name in expected.keys() - actual.keys() if not name.startswith("loss")}
    assert not missing  # not every loop records its losses
    for name, value in actual.items():
        if name.startswith("graph"):
            assert torch.equal(value, expected[name]), name
        else:
            atol = 1e-5 * max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert any(".mlp.gate." in name for name in actual if name.startswith("grad"))


def sgd(model, lr=LR):
    return torch.optim.SGD(model.parameters(), lr=lr)


def micro_batch(number, rank=0):
    """Two rows, one padded to the left and one to the right. Each has as many labels as any other."""
    seed = number * RANKS + rank
    ids = make_ids(2, 8, seed=seed)
    mask = torch.ones_like(ids)
    mask[seed % 2, 5:] = 0
    mask[1 - seed % 2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def steps_of(accumulation, ranks=1):
    """For each optimizer step its micro-batches, of all ranks, each with its weight."""
    weight = 1 / (accumulation * ranks)
    return [
        [(micro_batch(step * accumulation + i, rank), weight) for i in range(accumulation) for rank in range(ranks)]
        for step in range(STEPS)
    ]


class Record:
    """What a loop did, step by step, under the names that it has in the bare model.

    Attributes:
        tensors: `grad.STEP.NAME` as the optimizer saw it, `graph.STEP.NAME` after the step, `loss.STEP`.
    """

    def __init__(self, model):
        self.model = model
        self.step = 0
        self.tensors = {}
        self.losses = []

    def gradients(self, of=lambda parameter: parameter.grad):
        for name, parameter in self.model.named_parameters():
            gradient = of(parameter)
            if gradient is not None:
                self.tensors[f"grad.{self.step}.{name}"] = gradient.detach().clone()

    def graphs(self):
        graphs = expert_graphs(self.model).items()
        self.tensors |= {f"graph.{self.step}.{name}": graph for name, graph in graphs}
        if self.losses:
            self.tensors[f"loss.{self.step}"] = torch.stack(self.losses).sum()
        self.losses = []
        self.step += 1
        assert {int(router.symphony.updates) for _, router in symphony_routers(self.model)} == {self.step}


def plain_loop(model, steps, lr=LR):
    """The reference. What it must do for us is the line after `zero_grad`."""
    record, optimizer = Record(model), sgd(model, lr)
    for micro_batches in steps:
        for batch, weight in micro_batches:
            loss = model(**batch).loss * weight
            loss.backward()
            record.losses.append(loss.detach())
        record.gradients()
        optimizer.step()
        optimizer.zero_grad()
        run_line_of("plain PyTorch", model=model)
        record.graphs()
    return record.tensors


def accelerate_loop(model, accumulation, rank=0):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    record = Record(model)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    for number in range(STEPS * accumulation):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**micro_batch(number, rank)).loss)
            if accelerator.sync_gradients:
                record.gradients()
            optimizer.step()
            optimizer.zero_grad()
        run_line_of("Accelerate", accelerator=accelerator, model=wrapped)
        if accelerator.sync_gradients:
            record.graphs()
    return record.tensors


def engine_loop(model, accumulation, stage, rank=0, lr=LR, **config):
    """DeepSpeed's engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=sgd(model, lr),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,  # else 1.0
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            **config,
        },
    )
    assert engine.zero_optimization_stage() == stage
    assert all(hasattr(p, "ds_shape") == (stage == 3) for p in model.parameters())
    record = Record(model)
    for number in range(STEPS * accumulation):
        engine.backward(engine(**micro_batch(number, rank)).loss)
        if engine.is_gradient_accumulation_boundary():
            record.gradients(safe_get_full_grad)
        engine.step()
        run_line_of("DeepSpeed's engine", engine=engine)
        if engine.was_step_applied():
            record.graphs()
    engine.destroy()
    return record.tensors


def born_partitioned(settings=None, how="zero.Init", folder=None):
    """A model whose parameters ZeRO-3 has partitioned before `symphonize` sees them, or that comes so from a file."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    if how == "zero.Init":
        whole = make_model(output_router_logits=True).state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            # transformers looks up the padding's row, which is on one rank only.
            model = make_model(output_router_logits=True, pad_token_id=None)
        for name, parameter in model.named_parameters():  # what was drawn in there is not what is drawn outside
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if parameter.numel():
                    parameter.copy_(whole[name])
    else:
        kept = HfDeepSpeedConfig(config)  # for as long as the model is loaded
        model = AutoModelForCausalLM.from_pretrained(folder / how, experts_implementation="grouped_mm")
        del kept
    assert all(hasattr(parameter, "ds_shape") for parameter in model.parameters())
    return (model if how == "ours" else symphonize(model, **SETTINGS)).train()


@contextlib.contextmanager
def join(rank, ranks, folder):
    """Be one of the ranks, for whom a warning of ours is an error."""
    torch.set_num_threads(1)
    os.environ |= {
        f"{scope}{what}": str(n) for scope in ("", "LOCAL_") for what, n in (("RANK", rank), ("WORLD_SIZE", ranks))
    }
    warnings.simplefilter("error", SymphonyWarning)
    with local_group(rank, ranks, folder / "rendezvous"):
        yield


def run_accelerate(rank, folder):
    with join(rank, RANKS, folder):
        for accumulation in (1, 2):
            save_file(accelerate_loop(make(), accumulation, rank), folder / f"{accumulation}.{rank}.st")


def run_deepspeed(rank, ranks, folder):
    with join(rank, ranks, folder):
        import deepspeed

        # It would be built, which takes minutes; torch's own gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for stage in (0, 1, 2, 3):
            for accumulation in (1, 2):
                tensors = engine_loop(make(), accumulation, stage, rank)
                save_file(tensors, folder / f"{stage}.{accumulation}.{rank}.st")
        if ranks == 1:
            half = {"bf16": {"enabled": True}}
            save_file(engine_loop(make(), 2, 2, lr=0.0, **half), folder / "bf16.st")
            return
        for how in ("zero.Init", "stock", "ours"):
            tensors = engine_loop(born_partitioned(how=how, folder=folder), 2, 3, rank)
            save_file(tensors, folder / f"{how}.{rank}.st")
