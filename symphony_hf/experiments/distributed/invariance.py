"""`symphony check distributed`: the same training under accumulation, ranks, ZeRO, checkpointing, packing and compile.

The reference is one run on the union batch. Every arrangement sees the same tokens in each optimizer step, so graphs
must be bitwise equal and gradients equal up to rounding, at every step.
"""

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from symphony_hf.errors import ConfigError
from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.symphonize import expert_graphs
from symphony_hf.tables import Table, TableCell

from .arrangements import ARRANGEMENTS, NUM_STEPS, Arrangement, make_model, micro_batches
from .loops import DeepSpeedLoop, PlainLoop, local_group

GRADIENT_TOLERANCE = 1e-5
"""Float32 sums of hundreds of terms in a different order, relative to the largest sum."""

WEIGHT_TOLERANCE = NUM_STEPS * torch.finfo(torch.float32).eps
"""One rounding of a weight per step."""

_GRADIENT = "gradient."


@dataclass(frozen=True)
class Trace:
    """Record of a run, step by step.

    Attributes:
        graphs: Graphs and correction biases of all routers after each step, flattened. Shape: (steps, entries).
        weights: Weights of the routers after each step. Shape: (steps, routers, num_experts, hidden_size).
        gradients: Gradients by parameter. Shape of each: (steps, *parameter shape).
    """

    graphs: Tensor
    weights: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Comparison of an arrangement with its reference.

    Attributes:
        name: Name of the arrangement.
        reference: Name of the reference run; its own name for a reference.
        graphs_equal: Whether all graphs and correction biases are bitwise equal, at every step and on every rank.
        gradient_difference: Largest difference of a gradient, over parameters, steps and ranks, relative to that
            parameter's largest in that step.
        weight_difference: Largest difference of a router's weight, relative to the largest weight.
        skipped: Reason why it was not run.
    """

    name: str
    reference: str
    graphs_equal: bool = False
    gradient_difference: float = float("nan")
    weight_difference: float = float("nan")
    skipped: str = ""

    @property
    def holds(self) -> bool:
        is_close = self.gradient_difference <= GRADIENT_TOLERANCE and self.weight_difference <= WEIGHT_TOLERANCE
        return bool(self.skipped) or (self.graphs_equal and is_close)


def run(arrangement: Arrangement, rank: int = 0) -> Trace:
    """Train under an arrangement on one rank, and record each step."""
    model = make_model(arrangement)
    update_graphs(model)  # from here on this loop commits the graphs
    loop = DeepSpeedLoop(model, arrangement) if arrangement.zero is not None else PlainLoop(model, arrangement)
    graphs, weights, gradients = [], [], []
    for step in range(NUM_STEPS):
        gradients.append(loop.step(list(micro_batches(arrangement, step, rank))))
        update_graphs(model)
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        graphs.append(torch.cat([tensor.flatten() for tensor in (*expert_graphs(model).values(), *biases)]))
        weights.append(loop.router_weights())
    stacked = {name: torch.stack([step[name] for step in gradients]) for name in gradients[0]}
    return Trace(torch.stack(graphs), torch.stack(weights), stacked)


def run_ranks(names: list[str]) -> dict[str, list[Trace]]:
    """Run arrangements of several ranks in child processes, over gloo. Returns the traces of all ranks by name."""
    traces: dict[str, list[Trace]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({ARRANGEMENTS[name][0].ranks for name in names}):
            group = [name for name in names if ARRANGEMENTS[name][0].ranks == ranks]
            torch.multiprocessing.spawn(_run_on_rank, (ranks, group, folder), nprocs=ranks)  # type: ignore[attr-defined]
            for name in group:
                traces[name] = [_read_trace(_trace_file(folder, name, rank)) for rank in range(ranks)]
    return traces


def _trace_file(folder: str, name: str, rank: int) -> Path:
    return Path(folder) / f"{sorted(ARRANGEMENTS).index(name)}-{rank}.safetensors"


def _write_trace(trace: Trace, path: Path) -> None:
    gradients = {f"{_GRADIENT}{name}": gradient for name, gradient in trace.gradients.items()}
    save_file({"graphs": trace.graphs, "weights": trace.weights, **gradients}, path)


def _read_trace(path: Path) -> Trace:
    tensors = load_file(path)
    graphs, weights = tensors.pop("graphs"), tensors.pop("weights")
    return Trace(graphs, weights, {name.removeprefix(_GRADIENT): tensor for name, tensor in tensors.items()})


def _run_on_rank(rank: int, ranks: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # from DeepSpeed
    settings = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in settings.items()}, DS_ACCELERATOR="cpu")
    with local_group(rank, ranks, Path(folder) / f"rendezvous-{ranks}"):
        for name in names:
            _write_trace(run(ARRANGEMENTS[name][0], rank), _trace_file(folder, name, rank))


def check_distributed(only: str | None = None) -> list[Comparison]:
    """Run the arrangements that a part of their names selects.

    Args:
        only: Only arrangements with this text in their names, such as ZeRO.

    Raises:
        ConfigError: If there is none besides references.
    """
    names = [name for name in ARRANGEMENTS if only is None or only.lower() in name.lower()]
    compared = [name for name, (_, reference) in ARRANGEMENTS.items() if name != reference]
    if not set(names) & set(compared):
        raise ConfigError(
            f"symphony check distributed: no arrangement with a reference has {only!r} in its name: "
            f"{', '.join(compared)}"
        )
    return compare(names)


def compare(names: list[str] | None = None) -> list[Comparison]:
    """Run arrangements and their references, which takes a minute or two for all."""
    logging.set_verbosity_error()  # silences notes about settings that checkpointing changes
    wanted = list(ARRANGEMENTS if names is None else names)
    why_not = {name: reason for name in wanted if (reason := _why_not(ARRANGEMENTS[name][0]))}
    to_run = dict.fromkeys(name for n in wanted if n not in why_not for name in (ARRANGEMENTS[n][1], n))
    traces = run_ranks([name for name in to_run if ARRANGEMENTS[name][0].ranks > 1])
    for name in to_run:
        if name not in traces:
            traces[name] = [run(ARRANGEMENTS[name][0])]
    return [
        Comparison(name, ARRANGEMENTS[name][1], skipped=why_not[name])
        if name in why_not
        else _compare(name, traces[name], traces[ARRANGEMENTS[name][1]][0])
        for name in wanted
    ]


def _why_not(arrangement: Arrangement) -> str:
    if arrangement.zero is not None and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: pip install 'symphony-hf[deepspeed]'"
    return ""


def _compare(name: str, traces: list[Trace], reference: Trace) -> Comparison:
    largest = float(reference.weights.abs().max())
    return Comparison(
        name,
        ARRANGEMENTS[name][1],
        graphs_equal=all(torch.equal(trace.graphs, reference.graphs) for trace in traces),
        gradient_difference=_largest(_gradient_difference(trace, reference) for trace in traces),
        weight_difference=_largest(float((trace.weights - reference.weights).abs().max()) for trace in traces)
        / largest,
    )


def _gradient_difference(trace: Trace, reference: Trace) -> float:
    if trace.gradients.keys() != reference.gradients.keys():
        return float("inf")  # a parameter has a gradient in only one of them
    return _largest(
        float(((trace.gradients[name] - wanted).flatten(1).abs().amax(1) / wanted.flatten(1).abs().amax(1)).max())
        for name, wanted in reference.gradients.items()
    )


def _largest(differences: Iterable[float]) -> float:
    """Return the largest difference, NaN if one is NaN, which Python's `max` may drop."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())


def print_comparisons(comparisons: list[Comparison], console: Console | None = None) -> None:
    """Print the comparisons as a table."""
    Table(
        f"{NUM_STEPS} steps of each arrangement, compared with its reference",
        ["arrangement", "reference", "graphs", "gradients, off by", "weights, off by", ""],
        [[row.name, *_cells(row)] for row in comparisons],
        caption="Graphs: on every rank, after every step. Gradients (cross-entropy and router losses) and the routers' "
        "weights: largest difference, relative to the largest value.",
    ).print(console)


def _cells(row: Comparison) -> list[TableCell | str]:
    if row.skipped:
        return [row.reference, "", "", "", row.skipped]
    if row.name == row.reference:
        return ["", "", "", "", "the reference"]
    off_by = [TableCell(f"{off:.1e}", off) for off in (row.gradient_difference, row.weight_difference)]
    return [
        row.reference,
        "same bits" if row.graphs_equal else "DIFFER",
        *off_by,
        "holds" if row.holds else "FAILS",
    ]
