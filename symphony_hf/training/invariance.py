"""The same training in many arrangements: gradient accumulation, ranks, ZeRO, checkpointing, packing, compile.

One run on the union batch is the measure. Every arrangement sees the same tokens in each optimizer step, so the graphs
must be the same numbers and the routers' weights the same to rounding, step by step.
"""

import contextlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..attachment import update_graphs
from ..patching import expert_graphs, symphonize, symphony_routers
from .zero import prepare_deepspeed

NUM_STEPS, NUM_ROWS, NUM_TOKENS, LENGTH, VOCAB = 8, 8, 12, 16, 64
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Arrangement:
    """How one optimizer step is run.

    Attributes:
        accumulation: Micro-batches a step and rank.
        ranks: Processes.
        zero: DeepSpeed's stage; None: no DeepSpeed, but DistributedDataParallel where there are ranks.
        offload: Whether DeepSpeed keeps the optimizer's states on the CPU.
        checkpointing: Whether activations are recomputed, and if so how.
        packed: Whether rows stand one behind the other in a single row, without padding.
        compiled: Whether the model is traced by torch.compile.
        scope: Of the balance loss; None where it has no weight.
    """

    accumulation: int = 1
    ranks: int = 1
    zero: int | None = None
    offload: bool = False
    checkpointing: str | None = None
    packed: bool = False
    compiled: bool = False
    scope: str | None = None


@dataclass(frozen=True)
class Trace:
    """What a run left behind, step by step.

    Attributes:
        graphs: After each step, all routers' stacked. Shape: (steps, routers, num_experts, num_experts).
        weights: The routers'. Shape: (steps, routers, num_experts, hidden_size).
    """

    graphs: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Comparison:
    """One arrangement beside the run that it must equal.

    Attributes:
        name: Of the arrangement.
        reference: Of that run.
        graphs_equal: Whether all graphs are the same bits in all steps, on every rank.
        weight_difference: The largest difference of a router's weight, over how far weights moved in all.
        skipped: Why it was not run.
    """

    name: str
    reference: str
    graphs_equal: bool = False
    weight_difference: float = field(default=float("nan"))
    skipped: str = ""

    @property
    def holds(self) -> bool:
        # Gradients are sums of float32 in another order; the weights differ by a few ulps of a step.
        return bool(self.skipped) or (self.graphs_equal and self.weight_difference <= 1e-4)


UNION = "union batch"
UNION_BALANCE = "union batch, balance loss"
ARRANGEMENTS: dict[str, tuple[Arrangement, str]] = {
    UNION: (Arrangement(), UNION),
    "accumulation 2": (Arrangement(accumulation=2), UNION),
    "accumulation 4": (Arrangement(accumulation=4), UNION),
    "accumulation 8": (Arrangement(accumulation=8), UNION),
    "checkpointing, reentrant": (Arrangement(checkpointing="reentrant"), UNION),
    "checkpointing, non-reentrant": (Arrangement(checkpointing="non-reentrant"), UNION),
    "packed": (Arrangement(packed=True), UNION),
    "torch.compile": (Arrangement(compiled=True), UNION),
    "DDP, 2 ranks": (Arrangement(ranks=2), UNION),
    "DDP, 2 ranks, accumulation 2": (Arrangement(ranks=2, accumulation=2), UNION),
    "DDP, 2 ranks, checkpointing": (Arrangement(ranks=2, checkpointing="non-reentrant"), UNION),
    "ZeRO-1, 2 ranks": (Arrangement(ranks=2, zero=1), UNION),
    "ZeRO-2, 2 ranks": (Arrangement(ranks=2, zero=2), UNION),
    "ZeRO-3, 2 ranks": (Arrangement(ranks=2, zero=3), UNION),
    "ZeRO-1, 2 ranks, offload": (Arrangement(ranks=2, zero=1, offload=True), UNION),
    "ZeRO-2, 2 ranks, offload, accumulation 2": (Arrangement(ranks=2, zero=2, offload=True, accumulation=2), UNION),
    "ZeRO-3, 2 ranks, offload": (Arrangement(ranks=2, zero=3, offload=True), UNION),
    UNION_BALANCE: (Arrangement(scope="local"), UNION_BALANCE),
    "balance local, accumulation 2": (Arrangement(scope="local", accumulation=2), "balance local, accumulation 2"),
    "balance local, DDP, 2 ranks": (Arrangement(scope="local", ranks=2), "balance local, accumulation 2"),
    "balance local, ZeRO-2, 2 ranks": (Arrangement(scope="local", ranks=2, zero=2), "balance local, accumulation 2"),
    "balance global, DDP, 2 ranks": (Arrangement(scope="global", ranks=2), UNION_BALANCE),
    "balance global, DDP, checkpointing": (
        Arrangement(scope="global", ranks=2, checkpointing="reentrant"),
        UNION_BALANCE,
    ),
    "balance global, ZeRO-2, 2 ranks": (Arrangement(scope="global", ranks=2, zero=2), UNION_BALANCE),
}


def make_model(arrangement: Arrangement) -> PreTrainedModel:
    """A small OLMoE, the same for every arrangement, symphonized."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    experts = "batched_mm" if arrangement.compiled else "eager"
    model = OlmoeForCausalLM(config).float()
    model.set_experts_implementation(experts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)  # far from ties, so that rounding changes no choice
    balance = 0.0 if arrangement.scope is None else 0.1
    scope: Any = arrangement.scope or "local"
    symphonize(model, decay=0.8, balance_loss_weight=balance, z_loss_weight=0.01, balance_scope=scope)
    if arrangement.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": arrangement.checkpointing == "reentrant"})
    return model.train()


def micro_batches(arrangement: Arrangement, step: int, rank: int) -> Iterator[dict[str, Tensor]]:
    """The parts of a step's batch that one rank runs, in order.

    Every row has as many tokens, with padding before, behind, or on both sides, so that all parts weigh the same.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, NUM_TOKENS), generator=generator)
    num_parts = arrangement.accumulation * arrangement.ranks
    size = NUM_ROWS // num_parts
    for part in range(rank * arrangement.accumulation, (rank + 1) * arrangement.accumulation):
        rows = tokens[part * size : (part + 1) * size]
        yield _packed(rows) if arrangement.packed else _padded(rows)


def _padded(rows: Tensor) -> dict[str, Tensor]:
    shape = (len(rows), LENGTH)
    ids, labels, mask = torch.zeros(shape).long(), torch.full(shape, -100), torch.zeros(shape).long()
    for row, tokens in enumerate(rows):
        first = row % (LENGTH - NUM_TOKENS + 1)
        place = slice(first, first + NUM_TOKENS)
        ids[row, place], mask[row, place], labels[row, place] = tokens, 1, tokens
        labels[row, first] = -100  # nothing before it to predict it from
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def _packed(rows: Tensor) -> dict[str, Tensor]:
    labels = rows.clone()
    labels[:, 0] = -100
    positions = torch.arange(NUM_TOKENS).repeat(len(rows))
    flat = {"input_ids": rows.reshape(1, -1), "labels": labels.reshape(1, -1)}
    return {**flat, "position_ids": positions.unsqueeze(0)}


def run(arrangement: Arrangement, rank: int = 0) -> Trace:
    """Train and take notes, on one rank."""
    model = make_model(arrangement)
    update_graphs(model)  # this loop says when the graphs move
    loop = _DeepSpeedLoop if arrangement.zero is not None else _PlainLoop
    steps = loop(model, arrangement)
    graphs, weights = [], []
    for step in range(NUM_STEPS):
        steps.step(list(micro_batches(arrangement, step, rank)))
        update_graphs(model)
        graphs.append(torch.stack(list(expert_graphs(model).values())))
        weights.append(steps.router_weights())
    return Trace(torch.stack(graphs), torch.stack(weights))


class _PlainLoop:
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

    def step(self, batches: list[dict[str, Tensor]]) -> None:
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            is_ddp = isinstance(self.forward, nn.parallel.DistributedDataParallel)
            with contextlib.nullcontext() if last or not is_ddp else self.forward.no_sync():
                (self.forward(**batch).loss / self.accumulation).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def router_weights(self) -> Tensor:
        return torch.stack([router.weight.detach().clone() for _, router in symphony_routers(self.model)])  # type: ignore[attr-defined]


class _DeepSpeedLoop:
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

    def step(self, batches: list[dict[str, Tensor]]) -> None:
        for batch in batches:
            self.engine.backward(self.engine(**batch).loss)
            self.engine.step()

    def router_weights(self) -> Tensor:
        import deepspeed

        weights = [router.weight for _, router in symphony_routers(self.model)]  # type: ignore[attr-defined]
        with deepspeed.zero.GatheredParameters(weights):
            return torch.stack([weight.detach().clone().float() for weight in weights])


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
                files = [load_file(_trace_file(folder, name, rank)) for rank in range(ranks)]
                traces[name] = [Trace(file["graphs"], file["weights"]) for file in files]
    return traces


def _trace_file(folder: str, name: str, rank: int) -> Path:
    return Path(folder) / f"{sorted(ARRANGEMENTS).index(name)}-{rank}.safetensors"


def _run_on_rank(rank: int, ranks: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # DeepSpeed's, about itself
    settings = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in settings.items()}, DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{ranks}", rank=rank, world_size=ranks)
    try:
        for name in names:
            trace = run(ARRANGEMENTS[name][0], rank)
            save_file({"graphs": trace.graphs, "weights": trace.weights}, _trace_file(folder, name, rank))
    finally:
        dist.destroy_process_group()


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
    start = torch.stack([r.weight.detach() for _, r in symphony_routers(make_model(Arrangement()))])  # type: ignore[attr-defined]
    return [
        Comparison(name, ARRANGEMENTS[name][1], skipped=why_not[name])
        if name in why_not
        else _compare(name, traces[name], traces[ARRANGEMENTS[name][1]][0], start)
        for name in wanted
    ]


def _why_not(arrangement: Arrangement) -> str:
    if arrangement.zero is not None and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: pip install 'symphony-hf[deepspeed]'"
    return ""


def _compare(name: str, traces: list[Trace], reference: Trace, start: Tensor) -> Comparison:
    equal = all(torch.equal(trace.graphs, reference.graphs) for trace in traces)
    moved = float((reference.weights[-1] - start).abs().max())
    difference = max(float((trace.weights - reference.weights).abs().max()) for trace in traces)
    return Comparison(name, ARRANGEMENTS[name][1], equal, difference / moved)


def print_comparisons(comparisons: list[Comparison], console: Console | None = None) -> None:
    """The comparisons as a table."""
    console = console or Console()
    table = Table(title=f"{NUM_STEPS} steps, each arrangement beside the run that it must equal", title_justify="left")
    for name in ("arrangement", "must equal", "graphs", "weights, off by", ""):
        table.add_column(name)
    for row in comparisons:
        graphs = "same bits" if row.graphs_equal else "DIFFER"
        cells = ["", "", row.skipped] if row.skipped else [graphs, f"{row.weight_difference:.1e}", _verdict(row)]
        table.add_row(row.name, row.reference, *cells)
    console.print(table)
    console.print("weights, off by: the largest difference, over how far the weights moved in all", highlight=False)


def _verdict(row: Comparison) -> str:
    return "holds" if row.holds else "FAILS"
