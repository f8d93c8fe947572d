"""`symphony bench`: what the graph costs, at the true layer shapes of large models.

One decoder layer (attention and MoE) of each model, T tokens, random weights. Three forms of it share their experts
and compute the same routing, so that the experts' work is the same in all:

- stock: the family's own router, holding the folded weight A W
- symphony: the Symphony router, holding W and the graph; in training it also counts, adds both losses, and commits
- folded: what `fold` leaves of the Symphony one

They run in alternation in one process, the order turned at each round, and the ratio is taken within each round.
"""

import copy
import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel

from symphony_hf.compat import __version__, transformers_version
from symphony_hf.errors import ConfigError, nearest
from symphony_hf.files import check_file_place, write_json
from symphony_hf.patching.attachment import add_router_losses, update_graphs
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import symphonize, symphony_routers

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}
Step = Callable[[nn.Module, Tensor], None]
AIMS = {"training": 1.02, "inference": 1.005, "folded": 1.0}
_MIN_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One measured ratio.

    Attributes:
        model: Whose layer shapes.
        mode: `training` (forward and backward) or `inference`, of the symphony form; `folded`: its inference;
            `noise`: stock against stock.
        tokens: Of one forward.
        rounds: How many ratios the median is of.
        ratio: Median over rounds of its time over stock's in the same round.
        low: Their 25th percentile.
        high: Their 75th percentile.
        stock_seconds: Median time of stock.
    """

    model: str
    mode: str
    tokens: int
    rounds: int
    ratio: float
    low: float
    high: float
    stock_seconds: float


def run_bench(
    models: Sequence[str] | None = None,
    *,
    tokens: int = 1024,
    device: str | None = None,
    dtype: str | None = None,
    seconds: float = 60.0,
    output: str | Path = "symphony-bench.json",
) -> dict[str, Any]:
    """Measure every model's rows, and write them as JSON.

    Args:
        models: Keys of SHAPES; all when None.
        tokens: Of one forward; halved until it fits where memory runs out.
        device: The accelerator when None and there is one, else the CPU.
        dtype: `float32` or `bfloat16`; float32 on the CPU when None, else bfloat16.
        seconds: Time for each row, after warm-up; at least five rounds are run.
        output: The JSON file.

    Returns:
        The rows, and what they were measured on.

    Raises:
        ConfigError: If a model, the device or the type is unknown.
    """
    check_file_place(output, "bench")
    names = list(SHAPES) if models is None else list(models)
    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"bench: unknown model `{name}`; {nearest(name, SHAPES)}")
    if tokens < 1:
        raise ConfigError(f"bench: `tokens` must be at least 1, got {tokens}")
    place = find_device(device)
    kind = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if kind not in ("float32", "bfloat16"):
        raise ConfigError(f"bench: `dtype` is {kind!r}; known names: bfloat16, float32")
    rows: list[Row] = []
    with tqdm(total=len(names) * 4, desc="bench", unit=" rows", disable=None) as bar:
        for name in names:
            rows += _bench_model(name, tokens, place, getattr(torch, kind), seconds, bar)
    result = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "aims": AIMS,
        "device": torch.cuda.get_device_name() if place.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": kind,
        "seconds_per_row": seconds,
        "versions": {"symphony_hf": __version__, "torch": torch.__version__, "transformers": transformers_version()},
        "output": str(output),
    }
    write_json(Path(output), result)
    return result


def find_device(name: str | None) -> torch.device:
    """A device by name; the accelerator, or else the CPU, for None.

    Raises:
        ConfigError: If it is not to be had.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"bench: device `{name}` is not to be had here: {str(error).splitlines()[0]}") from error


def build_forms(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """The three forms of one decoder layer, which share all parameters but their routers'.

    Returns:
        `stock`, `symphony` and `folded` models without embeddings of any size, computing the same.
    """
    config = AutoConfig.for_model(**SHAPES[name], num_hidden_layers=1, vocab_size=8, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        symphony = AutoModel.from_config(config, dtype=dtype)
    shared = {id(p): p for p_name, p in symphony.named_parameters() if not p_name.endswith("gate.weight")}
    folded = copy.deepcopy(symphony, memo=dict(shared))
    for model in (symphony, folded):
        symphonize(model)
        for seed, (_, router) in enumerate(symphony_routers(model)):
            graph = active_graph(router.symphony)
            random = torch.rand(graph.num_experts, graph.num_experts, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                # Mostly itself, as a learned graph is: the routing must stay as even as the stock one's.
                graph.adjacency.add_((0.02 * (random + random.T)).to(device) * graph.adjacency.diagonal().mean())
    fold(folded)
    stock = copy.deepcopy(folded, memo={id(p): p for p in folded.parameters()})
    return {"stock": stock, "symphony": symphony, "folded": folded}


def _bench_model(
    name: str, tokens: int, device: torch.device, dtype: torch.dtype, seconds: float, bar: "tqdm[Any]"
) -> list[Row]:
    forms = build_forms(name, device, dtype)
    hidden_size = SHAPES[name]["hidden_size"]
    while True:
        inputs = torch.randn(1, tokens, hidden_size, device=device, dtype=dtype)
        try:
            _symphony_training_step(forms["symphony"], inputs)
            break
        except (torch.OutOfMemoryError, MemoryError):
            tokens //= 2
            if tokens == 0:
                raise
        except RuntimeError as error:
            if "can't allocate memory" not in str(error) or tokens == 1:  # what PyTorch's CPU allocator says
                raise
            tokens //= 2
    modes: list[tuple[str, str, Step, Step]] = [
        ("training", "symphony", _training_step, _symphony_training_step),
        ("inference", "symphony", _inference_step, _inference_step),
        ("folded", "folded", _inference_step, _inference_step),
        ("noise", "stock", _inference_step, _inference_step),
    ]
    rows = []
    for mode, form, stock_step, step in modes:
        bar.set_postfix_str(f"{name}, {mode}")
        ratios, stock_seconds = alternate(
            functools.partial(stock_step, forms["stock"], inputs),
            functools.partial(step, forms[form], inputs),
            seconds,
            device,
        )
        low, median, high = np.percentile(ratios, [25, 50, 75])
        rows.append(Row(name, mode, tokens, len(ratios), float(median), float(low), float(high), stock_seconds))
        bar.update()
    return rows


def measure_layer(name: str, seconds: float, tokens: int = 1024) -> float:
    """Median seconds of a stock decoder layer's training step, forward and backward, on the CPU in float32."""
    form = build_forms(name, torch.device("cpu"), torch.float32)["stock"]
    step = functools.partial(_training_step, form, torch.randn(1, tokens, SHAPES[name]["hidden_size"]))
    return alternate(step, step, seconds, torch.device("cpu"))[1]


def _training_step(model: nn.Module, inputs: Tensor) -> None:
    model.train()
    model(inputs_embeds=inputs.requires_grad_()).last_hidden_state.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def _symphony_training_step(model: nn.Module, inputs: Tensor) -> None:
    model.train()
    loss = model(inputs_embeds=inputs.requires_grad_()).last_hidden_state.float().square().mean()
    add_router_losses(model, loss).backward()
    update_graphs(model)
    model.zero_grad(set_to_none=True)


@torch.inference_mode()
def _inference_step(model: nn.Module, inputs: Tensor) -> None:
    model.eval()
    model(inputs_embeds=inputs)


def alternate(
    stock: Callable[[], None], other: Callable[[], None], seconds: float, device: torch.device
) -> tuple[list[float], float]:
    """Run two steps in alternation, their order turned at each round.

    Returns:
        Ratios of the other's time to stock's, one a round, and stock's median seconds.
    """
    for _ in range(2):
        stock()
        other()
    ratios: list[float] = []
    stock_times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(ratios) < _MIN_ROUNDS or time.perf_counter() < deadline:
        if len(ratios) % 2 == 0:
            stock_time, other_time = _time(stock, device), _time(other, device)
        else:
            other_time, stock_time = _time(other, device), _time(stock, device)
        stock_times.append(stock_time)
        ratios.append(other_time / stock_time)
    return ratios, float(np.median(stock_times))


def _time(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def bench_table(result: dict[str, Any]) -> list[list[str]]:
    """The rows of a result as text, header first."""
    table = [["model", "mode", "tokens", "ratio", "quartiles", "rounds", "stock, ms", "aim"]]
    for row in result["rows"]:
        aim = result["aims"].get(row["mode"])
        quartiles = f"{row['low']:.4f} to {row['high']:.4f}"
        numbers = [f"{row['ratio']:.4f}", quartiles, str(row["rounds"]), f"{1000 * row['stock_seconds']:.0f}"]
        table.append([row["model"], row["mode"], str(row["tokens"]), *numbers, "" if aim is None else f"{aim:g}"])
    return table


def print_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows as a table, and where the JSON is."""
    console = console or Console()
    title = f"Time over stock, one decoder layer, {result['dtype']} on {result['device']}"
    table = Table(title=title, title_justify="left")
    header, *rows = bench_table(result)
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Written to {Path(result['output']).resolve()}", highlight=False, soft_wrap=True)
