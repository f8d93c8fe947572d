"""`symphony bench-commit`: what moving the graphs costs where several processes train together, and what logging them.

At each optimizer step the counts of all layers go through one all-reduce. It is timed with the rest of the commit, over
gloo on this machine, and set beside a training step of as many of OLMoE's decoder layers at their true shapes. So is
all that `SymphonyCallback` and `GraphMonitor` add to a log, as if every step were logged.
"""

import dataclasses
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeModel, TrainerControl, TrainerState
from transformers.utils import logging

from symphony_hf.compat import __version__
from symphony_hf.experiments.distributed.loops import local_group
from symphony_hf.files import check_file_place, write_json
from symphony_hf.patching.attachment import tracker_of, update_graphs
from symphony_hf.patching.symphonize import symphonize
from symphony_hf.training.callback import SymphonyCallback
from symphony_hf.training.monitor import GraphMonitor

from .layer import measure_layer

PROCESSES = (1, 2, 4)
SIZES = ((4, 64), (4, 256), (32, 64), (32, 256))
"""Layers and experts of each."""
_LAYER, _ROUNDS, _WARM_UP = "olmoe-1b-7b", 30, 5


@dataclass(frozen=True)
class CommitRow:
    """The commit, or the log, of one arrangement.

    Attributes:
        work: `commit` or `log`.
        processes: That train together.
        layers: With a router each.
        experts: Of each router.
        seconds: Median time, on the first process.
        low: 25th percentile.
        high: 75th percentile.
        share: Of a training step of as many layers, `layers` times the measured one.
    """

    work: str
    processes: int
    layers: int
    experts: int
    seconds: float
    low: float
    high: float
    share: float


def run_bench_commit(
    output: str | Path = "symphony-bench-commit.json",
    seconds: float = 20.0,
    processes: tuple[int, ...] = PROCESSES,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> dict[str, Any]:
    """Measure all arrangements and write them as JSON.

    Args:
        output: The JSON file.
        seconds: Time for the training step of one layer that they are set beside.
        processes: How many train together, one arrangement after the other.
        sizes: (layers, experts) of each model.

    Returns:
        The rows, and what they were measured on.
    """
    check_file_place(output, "bench-commit")
    logging.set_verbosity_error()
    layer_seconds = measure_layer(_LAYER, seconds)
    rows: list[CommitRow] = []
    for number in tqdm(processes, desc="bench-commit", unit=" arrangements", disable=None):
        for (layers, experts), times in zip(sizes, _times(number, sizes), strict=True):
            rows.append(_row("commit", number, layers, experts, times, layer_seconds))
    rows += [_row("log", 1, layers, experts, _time_logs(layers, experts), layer_seconds) for layers, experts in sizes]
    result = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "layer": _LAYER,
        "layer_seconds": layer_seconds,
        "rounds": _ROUNDS,
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"symphony_hf": __version__, "torch": torch.__version__},
        "output": str(output),
    }
    write_json(Path(output), result)
    return result


def _row(work: str, processes: int, layers: int, experts: int, times: list[float], layer_seconds: float) -> CommitRow:
    low, median, high = (float(value) for value in np.percentile(times, [25, 50, 75]))
    return CommitRow(work, processes, layers, experts, median, low, high, median / (layers * layer_seconds))


def _times(processes: int, sizes: tuple[tuple[int, int], ...]) -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (processes, sizes, folder), nprocs=processes)  # type: ignore[attr-defined]
        return [np.load(Path(folder) / f"{layers}-{experts}.npy").tolist() for layers, experts in sizes]


def _run_rank(rank: int, processes: int, sizes: tuple[tuple[int, int], ...], folder: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with local_group(rank, processes, Path(folder) / "rendezvous"):
        for layers, experts in sizes:
            times = _time_commits(layers, experts)
            if rank == 0:
                np.save(Path(folder) / f"{layers}-{experts}.npy", times, allow_pickle=False)


def _model(layers: int, experts: int) -> Any:
    """A model whose routers have the true number of experts, and nothing else has its true size."""
    config = OlmoeConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_experts=experts,
        num_experts_per_tok=8,
        pad_token_id=0,
    )
    return symphonize(OlmoeModel(config), balance_loss_weight=0.0, z_loss_weight=0.0).train()


def _time_commits(layers: int, experts: int) -> list[float]:
    model = _model(layers, experts)
    model(torch.ones(1, 4, dtype=torch.long))
    times = []
    for _ in range(_WARM_UP + _ROUNDS):
        for stack in tracker_of(model).stacks:
            stack.has_pending = True
        dist.barrier()
        started = time.perf_counter()
        update_graphs(model)
        times.append(time.perf_counter() - started)
    return times[_WARM_UP:]


def _time_logs(layers: int, experts: int) -> list[float]:
    """All that a recipe's run adds to one log of the Trainer: the router losses, and the numbers on the graphs."""
    model, callbacks = _model(layers, experts), (SymphonyCallback(), GraphMonitor(pictures=False))
    state, control = TrainerState(), TrainerControl()
    arguments: Any = SimpleNamespace(output_dir=".")  # all that they would read of it
    callbacks[1].on_train_begin(arguments, state, control, model=model)
    times = []
    for _ in range(_WARM_UP + _ROUNDS):
        tracker_of(model).logged_losses = torch.ones(1 + layers, 3)  # balance, z, forwards
        logs: dict[str, Any] = {"loss": 1.0}
        started = time.perf_counter()
        for callback in callbacks:
            callback.on_log(arguments, state, control, model=model, logs=logs)
        times.append(time.perf_counter() - started)
    return times[_WARM_UP:]


def commit_table(result: dict[str, Any], work: str = "commit") -> list[list[str]]:
    """The rows of one kind of work as text, header first."""
    table = [["processes", "layers", "experts", f"{work}, ms", "quartiles", "of a training step"]]
    for row in result["rows"]:
        if row["work"] != work:
            continue
        quartiles = f"{1000 * row['low']:.2f} to {1000 * row['high']:.2f}"
        numbers = [str(row[name]) for name in ("processes", "layers", "experts")]
        table.append([*numbers, f"{1000 * row['seconds']:.2f}", quartiles, f"{row['share']:.3%}"])
    return table


def print_bench_commit(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows as a table for each kind of work, and where the JSON is."""
    console = console or Console()
    for work in ("commit", "log"):
        header, *rows = commit_table(result, work)
        table = Table(*header, title=f"One {work}, beside training steps of {result['layer']}'s layers")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"Written to {Path(result['output']).resolve()}", highlight=False, soft_wrap=True)
