"""The same training in many arrangements: gradient accumulation, ranks, ZeRO, checkpointing, packing, compile.

One run on the union batch is the measure. Every arrangement sees the same tokens in each optimizer step, so the graphs
must be the same numbers, and every gradient the same to rounding, step by step.
"""

import importlib.util
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.symphonize import expert_graphs

from .arrangements import ARRANGEMENTS, NUM_STEPS, Arrangement, make_model, micro_batches
from .loops import DeepSpeedLoop, PlainLoop, local_group

GRADIENT_TOLERANCE = 1e-5
"""Sums of float32 in another order, of hundreds of terms, over the largest of the sums."""

WEIGHT_TOLERANCE = NUM_STEPS * torch.finfo(torch.float32).eps
"""Each step rounds a weight once."""

_GRADIENT = "gradient."


@dataclass(frozen=True)
class Trace:
    """What a run left behind, step by step.

    Attributes:
        graphs: After each step, all routers' stacked. Shape: (steps, routers, num_experts, num_experts).
        weights: The routers'. Shape: (steps, routers, num_experts, hidden_size).
        gradients: What the optimizer was given, by parameter. Shape of each: (steps, *the parameter's).
    """

    graphs: Tensor
    weights: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One arrangement beside the run that it must equal.

    Attributes:
        name: Of the arrangement.
        reference: Of that run; the same name where it is the measure itself.
        graphs_equal: Whether all graphs are the same bits in all steps, on every rank.
        gradient_difference: The largest difference of a gradient, of any parameter, step and rank, over the largest
            of that parameter in that step.
        weight_difference: The largest difference of a router's weight, over the largest of these weights.
        skipped: Why it was not run.
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
    """Train and take notes, on one rank."""
    model = make_model(arrangement)
    update_graphs(model)  # this loop says when the graphs move
    loop = DeepSpeedLoop(model, arrangement) if arrangement.zero is not None else PlainLoop(model, arrangement)
    graphs, weights, gradients = [], [], []
    for step in range(NUM_STEPS):
        gradients.append(loop.step(list(micro_batches(arrangement, step, rank))))
        update_graphs(model)
        graphs.append(torch.stack(list(expert_graphs(model).values())))
        weights.append(loop.router_weights())
    stacked = {name: torch.stack([seen[name] for seen in gradients]) for name in gradients[0]}
    return Trace(torch.stack(graphs), torch.stack(weights), stacked)


def run_ranks(names: list[str]) -> dict[str, list[Trace]]:
    """Run arrangements of several ranks in processes of their own, over gloo on this machine.

    Returns:
        The traces of all ranks, by name.
    """
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
    warnings.simplefilter("ignore")  # DeepSpeed's, about itself
    settings = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in settings.items()}, DS_ACCELERATOR="cpu")
    with local_group(rank, ranks, Path(folder) / f"rendezvous-{ranks}"):
        for name in names:
            _write_trace(run(ARRANGEMENTS[name][0], rank), _trace_file(folder, name, rank))


def compare(names: list[str] | None = None) -> list[Comparison]:
    """Run arrangements and the runs that they must equal: a minute or two for all.

    Args:
        names: Of ARRANGEMENTS; all when None.
    """
    logging.set_verbosity_error()  # of settings that a checkpointed model changes for itself
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
        gradient_difference=max(_gradient_difference(trace, reference) for trace in traces),
        weight_difference=max(float((trace.weights - reference.weights).abs().max()) for trace in traces) / largest,
    )


def _gradient_difference(trace: Trace, reference: Trace) -> float:
    if trace.gradients.keys() != reference.gradients.keys():
        return float("inf")  # a parameter has no gradient in one of them
    return max(
        float(((trace.gradients[name] - wanted).flatten(1).abs().amax(1) / wanted.flatten(1).abs().amax(1)).max())
        for name, wanted in reference.gradients.items()
    )


def print_comparisons(comparisons: list[Comparison], console: Console | None = None) -> None:
    """The comparisons as a table."""
    console = console or Console()
    table = Table(title=f"{NUM_STEPS} steps, each arrangement beside the run that it must equal", title_justify="left")
    for name in ("arrangement", "must equal", "graphs", "gradients, off by", "weights, off by", ""):
        table.add_column(name)
    for row in comparisons:
        table.add_row(row.name, *_cells(row))
    console.print(table)
    console.print(
        "Graphs: on every rank, after every step. Gradients of the cross-entropy and the router losses: of every "
        "parameter, step and rank, over that parameter's largest. Weights: the routers', over the largest.",
        highlight=False,
    )


def _cells(row: Comparison) -> list[str]:
    if row.skipped:
        return [row.reference, "", "", "", row.skipped]
    if row.name == row.reference:
        return ["", "", "", "", "the measure"]
    off_by = [f"{difference:.1e}" for difference in (row.gradient_difference, row.weight_difference)]
    return [
        row.reference,
        "same bits" if row.graphs_equal else "DIFFER",
        *off_by,
        "holds" if row.holds else "FAILS",
    ]
