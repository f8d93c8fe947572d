"""Training of a run: the recipe's settings in a plain single-process loop."""

import time
from collections.abc import Iterator
from multiprocessing import parent_process
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from symphony_hf.patching.attachment import update_graphs

from .damage import damage_batch
from .graph_control import GraphControl
from .point import Point
from .selection import follow_graphs
from .study import Study

CURVE_POINTS = 40
"""Number of points of a loss curve."""


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


def train(
    model: PreTrainedModel,
    study: Study,
    point: Point,
    seed: int,
    stream_N: Tensor,
    *,
    rate: float | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Train a model in place with Adam, at a constant rate after the warm-up, as published.

    Args:
        model: A model of `build_model`.
        study: The study.
        point: The model's point.
        seed: Seed of batches and damage.
        stream_N: Training tokens. Shape: (tokens,).
        rate: Learning rate; the recipe's when None.
        steps: Number of optimizer steps; the study's when None.

    Returns:
        `curve`: pairs of (step, mean loss since the last pair, in nats per token); `train_seconds`: wall time;
        `train_cpu_seconds`: CPU time.
    """
    rate, warmup, steps = rate or study.learning_rate, study.warmup_steps, steps or study.steps
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    control = GraphControl(model, point, steps, seed)
    damage = torch.Generator().manual_seed(seed)
    vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr]
    order = batches(stream_N, study.recipe.data.block_size, study.batch_size, seed)
    every = max(1, steps // CURVE_POINTS)
    losses: list[Tensor] = []
    curve: list[tuple[int, float]] = []
    study_process, started, cpu_started = parent_process(), time.perf_counter(), time.process_time()
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / warmup) if warmup else rate
        ids = labels = next(order)
        if point.damage:
            ids, labels = damage_batch(ids, point.damage, vocab_size, damage)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        control.before_update()
        update_graphs(model)
        control.after_update()
        if point.selection == "conditional":
            follow_graphs(model)
        losses.append(loss.detach())
        if step % every == 0 or step == steps:
            curve.append((step, float(torch.stack(losses).mean())))
            losses.clear()
        if study_process is not None and not study_process.is_alive():  # killed: the server that forked this one stays
            raise SystemExit(1)
    control.after_training()
    return {
        "curve": curve,
        "train_seconds": time.perf_counter() - started,
        "train_cpu_seconds": time.process_time() - cpu_started,
    }
