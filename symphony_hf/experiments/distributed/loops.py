"""Training loops of plain PyTorch and of DeepSpeed's engine that expose the gradients of each step."""

import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.patching.replay.contexts import record_routing, replay_routing
from symphony_hf.patching.symphonize import symphony_routers
from symphony_hf.training.zero import prepare_deepspeed

from .arrangements import LEARNING_RATE, NUM_ROWS, Arrangement, make_model


class Replay:
    """Replays the experts that a model with other weights chooses for each micro-batch, if the arrangement does so."""

    def __init__(self, model: PreTrainedModel, arrangement: Arrangement) -> None:
        self.model = model
        self.sampler = make_model(Arrangement(), seed=1).eval() if arrangement.replays else None

    @contextlib.contextmanager
    def __call__(self, batch: dict[str, Tensor]) -> Iterator[None]:
        if self.sampler is None:
            yield
            return
        with torch.no_grad(), record_routing(self.sampler) as choices:
            self.sampler(**batch)
        with replay_routing(self.model, choices):
            yield


class PlainLoop:
    """Training loop of plain PyTorch or DistributedDataParallel."""

    def __init__(self, model: PreTrainedModel, arrangement: Arrangement) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.accumulation = arrangement.accumulation
        self.replay = Replay(model, arrangement)
        self.forward: Any = model
        if arrangement.ranks > 1:
            reentrant = arrangement.checkpointing == "reentrant"
            self.forward = nn.parallel.DistributedDataParallel(model, static_graph=reentrant)
        elif arrangement.compiled:
            torch.compiler.reset()  # of the arrangements before, whose graphs count towards a limit of the same code
            self.forward = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run one optimizer step and return the gradients of the parameters."""
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            is_ddp = isinstance(self.forward, nn.parallel.DistributedDataParallel)
            with contextlib.nullcontext() if last or not is_ddp else self.forward.no_sync(), self.replay(batch):
                (self.forward(**batch).loss / self.accumulation).backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradients

    def router_weights(self) -> Tensor:
        """Return the routers' weights. Shape: (routers, num_experts, hidden_size)."""
        return torch.stack([router.weight.detach().clone() for _, router in symphony_routers(self.model)])  # type: ignore[attr-defined]


class DeepSpeedLoop:
    """Training loop of DeepSpeed's engine."""

    def __init__(self, model: PreTrainedModel, arrangement: Arrangement) -> None:
        import deepspeed

        prepare_deepspeed(model.device)
        self.model = model
        self.replay = Replay(model, arrangement)
        zero: dict[str, Any] = {"stage": arrangement.zero}
        if arrangement.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": NUM_ROWS // arrangement.accumulation // arrangement.ranks,
            "gradient_accumulation_steps": arrangement.accumulation,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # the default is 1
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        assert self.engine.zero_optimization_stage() == arrangement.zero
        assert bool(self.engine.zero_use_cpu_optimizer()) == arrangement.offload

    def step(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run one optimizer step and return the gradients of the parameters."""
        from deepspeed.utils import safe_get_full_grad

        seen: dict[str, Tensor] = {}
        for batch in batches:
            with self.replay(batch):
                loss = self.engine(**batch).loss
            self.engine.backward(loss)
            if self.engine.is_gradient_accumulation_boundary():
                gradients = {name: safe_get_full_grad(p) for name, p in self.model.named_parameters()}
                seen = {name: gradient.detach().clone() for name, gradient in gradients.items() if gradient is not None}
            self.engine.step()
        return seen

    def router_weights(self) -> Tensor:
        """Return the routers' weights. Shape: (routers, num_experts, hidden_size)."""
        import deepspeed

        weights = [router.weight for _, router in symphony_routers(self.model)]  # type: ignore[attr-defined]
        with deepspeed.zero.GatheredParameters(weights):
            return torch.stack([weight.detach().clone().float() for weight in weights])


_TIMEOUT = timedelta(minutes=2)  # of collectives that a rank does not join


@contextlib.contextmanager
def local_group(rank: int, ranks: int, rendezvous: str | Path) -> Iterator[None]:
    """Join a gloo group of `ranks` processes on this machine, through a file that does not exist yet.

    Objects that refer to the group, such as DistributedDataParallel's reducer, must not outlive it: keep them in the
    locals of a function that has returned. If the reducer holds the last reference, torch waits for gloo's threads
    while it holds the GIL, which a thread that frees a tensor needs, and can deadlock (pytorch/pytorch#56297).
    """
    dist.init_process_group("gloo", f"file://{rendezvous}", _TIMEOUT, world_size=ranks, rank=rank)
    try:
        yield
    finally:
        gc.collect()  # a wrapped model is in reference cycles
        dist.destroy_process_group()
