"""`symphony bench-commit`: the cost of committing the graphs with several processes, and of logging them.

At each optimizer step the counts of all layers go through one all-reduce. It is timed with the rest of the commit, over
gloo on this machine, and compared with a training step of as many of OLMoE's decoder layers at their true shapes. So is
everything that `SymphonyCallback` and `GraphMonitor` add to a log, as if every step were logged.
"""

import dataclasses
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
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeModel
from transformers.utils import logging

from symphony_hf.experiments.distributed.loops import local_group
from symphony_hf.patching.attachment import tracker_of, update_graphs
from symphony_hf.patching.symphonize import symphonize
from symphony_hf.results import check_file_place
from symphony_hf.tables import Table

from .layer import measure_layer
from .results import number_cell, print_result, range_cell, write_result
from .timing import quartiles

PROCESSES = (1, 2, 4)
SIZES = ((4, 64), (4, 256), (32, 64), (32, 256))
"""(layers, experts) of each model."""
_LAYER, _ROUNDS, _WARM_UP = "olmoe-1b-7b", 30, 5


@dataclass(frozen=True)
class CommitMeasurement:
    """The commit, or the log, of one arrangement.

    Attributes:
        work: `commit` or `log`.
        processes: Number of processes that train together.
        layers: Number of layers, with one router each.
        experts: Number of experts of each router.
        seconds: Median time, on the first process.
        low: 25th percentile.
        high: 75th percentile.
        share: Share of a training step of as many layers, `layers` times the measured one.
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
    """Measure all arrangements, and write the result as JSON.

    Args:
        output: Path of the JSON file.
        seconds: Time for measuring the training step of one layer.
        processes: Numbers of processes, measured one after the other.
        sizes: (layers, experts) of each model.

    Returns:
        The measurements, their settings and the machine.
    """
    check_file_place(output, "bench-commit")
    logging.set_verbosity_error()
    layer_seconds = measure_layer(_LAYER, seconds)
    rows: list[CommitMeasurement] = []
    for number in tqdm(processes, desc="bench-commit", unit=" arrangements", disable=None):
        for (layers, experts), times in zip(sizes, _times(number, sizes), strict=True):
            rows.append(_measurement("commit", number, layers, experts, times, layer_seconds))
    rows += [
        _measurement("log", 1, layers, experts, _time_logs(layers, experts), layer_seconds) for layers, experts in sizes
    ]
    values = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "layer": _LAYER,
        "layer_seconds": layer_seconds,
        "rounds": _ROUNDS,
    }
    return write_result(output, values)


def _measurement(
    work: str, processes: int, layers: int, experts: int, times: list[float], layer_seconds: float
) -> CommitMeasurement:
    low, median, high = quartiles(times)
    return CommitMeasurement(work, processes, layers, experts, median, low, high, median / (layers * layer_seconds))


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
    """Build a model with the true numbers of layers and experts; everything else is tiny."""
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
    model(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.sum().backward()
    tracker, times = tracker_of(model), []
    for _ in range(_WARM_UP + _ROUNDS):
        for counter in tracker.counters:  # the same observations, once more
            assert counter.record is not None
            counter.record.counted = False
            tracker.state.count(counter.key, counter.record)
        dist.barrier()
        started = time.perf_counter()
        update_graphs(model)
        times.append(time.perf_counter() - started)
    return times[_WARM_UP:]


def _time_logs(layers: int, experts: int) -> list[float]:
    """Time what a recipe's run adds to one of Trainer's logs: the router losses and the metrics of the graphs."""
    # Slow to import: the command line imports this file for its options.
    from transformers import TrainerControl, TrainerState

    from symphony_hf.training.callback import SymphonyCallback
    from symphony_hf.training.monitor import GraphMonitor

    model, callbacks = _model(layers, experts), (SymphonyCallback(), GraphMonitor(pictures=False))
    state, control = TrainerState(), TrainerControl()
    arguments: Any = SimpleNamespace(output_dir=".")  # the only attribute that they read
    callbacks[1].on_train_begin(arguments, state, control, model=model)
    times = []
    for _ in range(_WARM_UP + _ROUNDS):
        tracker_of(model).state.logged_losses = torch.ones(1 + layers, 3)  # balance, z, forwards
        logs: dict[str, Any] = {"loss": 1.0}
        started = time.perf_counter()
        for callback in callbacks:
            callback.on_log(arguments, state, control, model=model, logs=logs)
        times.append(time.perf_counter() - started)
    return times[_WARM_UP:]


def commit_table(result: dict[str, Any], work: str = "commit") -> Table:
    """Return the measurements of one kind of work as a table."""
    header = ["processes", "layers", "experts", f"{work}, ms", "quartiles", "of a training step"]
    rows = [
        [
            *(number_cell(row[name], "d") for name in ("processes", "layers", "experts")),
            number_cell(1000 * row["seconds"], ".2f"),
            range_cell(1000 * row["low"], 1000 * row["high"], ".2f"),
            number_cell(row["share"], ".3%"),
        ]
        for row in result["rows"]
        if row["work"] == work
    ]
    return Table(f"One {work}, beside training steps of {result['layer']}'s layers", header, rows)


def print_bench_commit(result: dict[str, Any], console: Console | None = None) -> None:
    """Print a table for each kind of work, and the path of the file."""
    print_result(result, [commit_table(result, work) for work in ("commit", "log")], console)
