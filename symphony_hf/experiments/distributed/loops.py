"""Loops of bare PyTorch and of DeepSpeed's engine, which show the gradients that their optimizer is given."""

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

from symphony_hf.patching.symphonize import symphony_routers
from symphony_hf.training.zero import prepare_deepspeed

from .arrangements import LEARNING_RATE, NUM_ROWS, Arrangement


class PlainLoop:
    """PyTorch alone, or DistributedDataParallel."""

    def __init__(self, model: PreTrainedModel, arrangement: Arrangement) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.accumulation = arrangement.accumulation
        self.forward: Any = model
        if arrangement.ranks > 1:
            reentrant = arrangement.checkpointing == "reentrant"
            self.forward = nn.parallel.DistributedDataParallel(model, static_graph=reentrant)
        elif arrangement.compiled:
            self.forward = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step of the optimizer; returns the gradients that it was given, by parameter."""
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            is_ddp = isinstance(self.forward, nn.parallel.DistributedDataParallel)
            with contextlib.nullcontext() if last or not is_ddp else self.forward.no_sync():
                (self.forward(**batch).loss / self.accumulation).backward()
        seen = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seen

    def router_weights(self) -> Tensor:
        """Shape: (routers, num_experts, hidden_size)."""
        return torch.stack([router.weight.detach().clone() for _, router in symphony_routers(self.model)])  # type: ignore[attr-defined]


class DeepSpeedLoop:
    """DeepSpeed's engine."""

    def __init__(self, model: PreTrainedModel, arrangement: Arrangement) -> None:
        import deepspeed

        prepare_deepspeed(model.device)
        self.model = model
        zero: dict[str, Any] = {"stage": arrangement.zero}
        if arrangement.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": NUM_ROWS // arrangement.accumulation // arrangement.ranks,
            "gradient_accumulation_steps": arrangement.accumulation,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # 1 where nothing is said
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        assert self.engine.zero_optimization_stage() == arrangement.zero
        assert bool(self.engine.zero_use_cpu_optimizer()) == arrangement.offload

    def step(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step of the optimizer; returns the gradients that it was given, by parameter."""
        from deepspeed.utils import safe_get_full_grad

        seen: dict[str, Tensor] = {}
        for batch in batches:
            self.engine.backward(self.engine(**batch).loss)
            if self.engine.is_gradient_accumulation_boundary():
                gradients = {name: safe_get_full_grad(p) for name, p in self.model.named_parameters()}
                seen = {name: gradient.detach().clone() for name, gradient in gradients.items() if gradient is not None}
            self.engine.step()
        return seen

    def router_weights(self) -> Tensor:
        """Shape: (routers, num_experts, hidden_size)."""
        import deepspeed

        weights = [router.weight for _, router in symphony_routers(self.model)]  # type: ignore[attr-defined]
        with deepspeed.zero.GatheredParameters(weights):
            return torch.stack([weight.detach().clone().float() for weight in weights])


_PATIENCE = timedelta(minutes=2)  # with a rank that does not come to a collective, before the others raise


@contextlib.contextmanager
def local_group(rank: int, ranks: int, rendezvous: str | Path) -> Iterator[None]:
    """Be one of `ranks` processes that find each other by a file.

    What refers to the group, as DistributedDataParallel's reducer does, must not outlive it: have it in the locals of a
    function that has returned. If the reducer is the last to let go, torch waits for gloo's threads to end and holds
    the interpreter's lock meanwhile, which a thread that drops a tensor needs: now and then that waits forever
    (pytorch/pytorch#56297).

    Args:
        rendezvous: The same path for all of them, of a file that does not exist yet.
    """
    dist.init_process_group("gloo", f"file://{rendezvous}", _PATIENCE, world_size=ranks, rank=rank)
    try:
        yield
    finally:
        gc.collect()  # a wrapped model is in reference cycles
        dist.destroy_process_group()
