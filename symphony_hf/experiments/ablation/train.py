"""Model and training of a run: the recipe's settings in a plain single-process loop."""

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.expert_graph import ExpertGraph, active_graph
from symphony_hf.patching.symphonize import symphonize, symphony_routers

from .point import SYSTEMS, Point
from .study import Study


def frozen_after(point: Point, steps: int) -> int:
    """Return the number of updates before a frozen graph stops."""
    return max(1, round(point.freeze_after * steps))


class GraphControl:
    """Freezes or shuffles graphs during training. Call its methods before and after `update_graphs`.

    Args:
        model: A Symphony model.
        point: Point whose `graph` is applied; only `frozen` and `random` have an effect.
        steps: Number of updates of the whole run.
        seed: Seed of the shuffling, which differs between routers.
    """

    def __init__(self, model: nn.Module, point: Point, steps: int, seed: int) -> None:
        self.kind = point.graph
        self.graphs: list[ExpertGraph] = [active_graph(router.symphony) for _, router in symphony_routers(model)]
        self.freeze_at = frozen_after(point, steps)
        self.updates = 0
        generator = torch.Generator().manual_seed(seed)
        self.orders = [torch.randperm(graph.num_experts, generator=generator) for graph in self.graphs]
        self.learned = [graph.adjacency.detach().clone() for graph in self.graphs]

    @torch.no_grad()
    def before_update(self) -> None:
        """Restore the moving average for the update."""
        if self.kind == "random":
            for graph, learned_EE in zip(self.graphs, self.learned, strict=True):
                graph.adjacency.copy_(learned_EE)

    @torch.no_grad()
    def after_update(self) -> None:
        """Set the graph that the next forward routes by."""
        self.updates += 1
        if self.kind == "random":
            for index, (graph, order_E) in enumerate(zip(self.graphs, self.orders, strict=True)):
                self.learned[index] = graph.adjacency.clone()
                graph.adjacency.copy_(shuffled(graph.adjacency, order_E))
        elif self.kind == "frozen" and self.updates <= self.freeze_at:
            self.learned = [graph.adjacency.clone() for graph in self.graphs]
        elif self.kind == "frozen":
            for graph, learned_EE in zip(self.graphs, self.learned, strict=True):
                graph.adjacency.copy_(learned_EE)


def shuffled(adjacency_EE: Tensor, order_E: Tensor) -> Tensor:
    """Permute the experts of a graph, which keeps its weights and spectrum.

    Args:
        adjacency_EE: A co-selection graph. Shape: (num_experts, num_experts).
        order_E: A permutation of the experts. Shape: (num_experts,).

    Returns:
        Q adjacency Q^T with the permutation matrix Q. Same shape.
    """
    return adjacency_EE[order_E][:, order_E]


CURVE_POINTS = 40


def build_model(study: Study, point: Point, vocab_size: int) -> PreTrainedModel:
    """Build a model of the recipe's sizes with the point's system and routing, from the global generator."""
    assert study.recipe.model.config is not None
    values = {**study.recipe.model.config, **SYSTEMS[point.system], "vocab_size": vocab_size, "use_cache": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    return symphonize(model, point.symphony(study.recipe.symphony))


def batches(stream_N: Tensor, block_size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of a stream without end, reshuffled in every epoch.

    Args:
        stream_N: Tokens. Shape: (tokens,).
        block_size: Tokens per row; an incomplete last row is dropped.
        batch_size: Number of rows in a batch.
        seed: Seed of the order.

    Yields:
        Shape: (batch_size, block_size).
    """
    blocks = stream_N[: len(stream_N) // block_size * block_size].view(-1, block_size)
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(len(blocks), generator=generator)])
        yield blocks[waiting[:batch_size]]
        waiting = waiting[batch_size:]


def train(model: PreTrainedModel, study: Study, point: Point, seed: int, stream_N: Tensor) -> dict[str, Any]:
    """Train a model in place with Adam, at a constant rate after the warm-up, as published.

    Returns:
        `curve`: pairs of (step, mean loss since the last pair, in nats per token); `train_seconds`: wall time;
        `train_cpu_seconds`: CPU time.
    """
    rate, warmup = study.learning_rate, study.warmup_steps
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    control = GraphControl(model, point, study.steps, seed)
    order = batches(stream_N, study.recipe.data.block_size, study.batch_size, seed)
    every = max(1, study.steps // CURVE_POINTS)
    losses: list[Tensor] = []
    curve: list[tuple[int, float]] = []
    parent, started, cpu_started = os.getppid(), time.perf_counter(), time.process_time()
    model.train()
    for step in range(1, study.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / warmup) if warmup else rate
        ids = next(order)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        control.before_update()
        update_graphs(model)
        control.after_update()
        losses.append(loss.detach())
        if step % every == 0 or step == study.steps:
            curve.append((step, float(torch.stack(losses).mean())))
            losses.clear()
        if os.getppid() != parent:  # the parent process is gone
            raise SystemExit(1)
    return {
        "curve": curve,
        "train_seconds": time.perf_counter() - started,
        "train_cpu_seconds": time.process_time() - cpu_started,
    }
