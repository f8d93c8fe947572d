"""`symphony bench`: the cost of the graph at the true layer shapes of large models.

One decoder layer (attention and MoE) of each model runs on T tokens with random weights, in three forms that share
their experts and compute the same routing, so that the experts' work is the same in all of them:

- stock: the family's own router, with the folded weight A W
- symphony: the Symphony router, with W and the graph; in training it also counts, adds both losses, and commits
- folded: the Symphony form after `fold`

They run in alternation in one process, and the ratio is taken within each round.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel

from symphony_hf.errors import ConfigError, nearest
from symphony_hf.files import check_file_place
from symphony_hf.patching.attachment import add_router_losses, update_graphs
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import symphonize, symphony_routers
from symphony_hf.tables import Table, TableCell

from .results import number_cell, print_result, range_cell, write_result
from .timing import alternate, find_device, quartiles

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
AIMS = {"training": 1.02, "inference": 1.005, "folded": 1.0}


@dataclass(frozen=True)
class Measurement:
    """One measured ratio.

    Attributes:
        model: Model whose layer shapes were used.
        mode: `training` (forward and backward) or `inference` of the symphony form; `folded`: inference of the folded
            form; `noise`: stock against stock.
        tokens: Tokens of one forward.
        rounds: Number of rounds.
        ratio: Median over rounds of its time over stock's in the same round.
        low: 25th percentile of these ratios.
        high: 75th percentile of these ratios.
        stock_seconds: Median time of the stock form.
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
    """Measure every model, and write the result as JSON.

    Args:
        models: Keys of SHAPES; all if None.
        tokens: Tokens of one forward; halved until they fit into memory.
        device: Device to measure on; if None, the accelerator, or the CPU if there is none.
        dtype: `float32` or `bfloat16`; if None, float32 on the CPU and bfloat16 elsewhere.
        seconds: Time for each measurement, after warm-up; at least five rounds are run.
        output: Path of the JSON file.

    Returns:
        The measurements, their settings and the machine.

    Raises:
        ConfigError: If a model, the device or the dtype is unknown.
    """
    check_file_place(output, "bench")
    names = list(models or SHAPES)
    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"bench: unknown model `{name}`; {nearest(name, SHAPES)}")
    if tokens < 1:
        raise ConfigError(f"bench: `tokens` must be at least 1, got {tokens}")
    chosen = find_device(device)
    kind = dtype or ("float32" if chosen.type == "cpu" else "bfloat16")
    if kind not in ("float32", "bfloat16"):
        raise ConfigError(f"bench: `dtype` is {kind!r}; known names: bfloat16, float32")
    rows: list[Measurement] = []
    with tqdm(total=len(names) * 4, desc="bench", unit=" rows", disable=None) as bar:
        for name in names:
            rows += _bench_model(name, tokens, chosen, getattr(torch, kind), seconds, bar)
    values = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "aims": AIMS,
        "dtype": kind,
        "seconds_per_row": seconds,
    }
    return write_result(output, values, chosen)


def build_forms(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Build the three forms of one decoder layer. They share all parameters but their routers'.

    Returns:
        The `stock`, `symphony` and `folded` models, which compute the same outputs.
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
                # Mostly diagonal, as a learned graph is, so that the routing stays as even as the stock one's.
                graph.adjacency.add_((0.02 * (random + random.T)).to(device) * graph.adjacency.diagonal().mean())
    fold(folded)
    stock = copy.deepcopy(folded, memo={id(p): p for p in folded.parameters()})
    return {"stock": stock, "symphony": symphony, "folded": folded}


def _bench_model(
    name: str, tokens: int, device: torch.device, dtype: torch.dtype, seconds: float, bar: "tqdm[Any]"
) -> list[Measurement]:
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
            if "can't allocate memory" not in str(error) or tokens == 1:  # the message of PyTorch's CPU allocator
                raise
            tokens //= 2
    modes = [
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
        low, median, high = quartiles(ratios)
        rows.append(Measurement(name, mode, tokens, len(ratios), median, low, high, stock_seconds))
        bar.update()
    return rows


def measure_layer(name: str, seconds: float, tokens: int = 1024) -> float:
    """Return the median seconds of a stock decoder layer's forward and backward, on the CPU in float32."""
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


def bench_table(result: dict[str, Any]) -> Table:
    """Return the measurements of a result as a table."""
    header = ["model", "mode", "tokens", "ratio", "quartiles", "rounds", "stock, ms", "aim"]
    rows: list[list[TableCell | str]] = []
    for row in result["rows"]:
        aim = result["aims"].get(row["mode"])
        rows.append(
            [
                row["model"],
                row["mode"],
                number_cell(row["tokens"], "d"),
                number_cell(row["ratio"], ".4f"),
                range_cell(row["low"], row["high"], ".4f"),
                number_cell(row["rounds"], "d"),
                number_cell(1000 * row["stock_seconds"], ".0f"),
                "" if aim is None else number_cell(aim, "g"),
            ]
        )
    return Table(f"Time over stock, one decoder layer, {result['dtype']} on {result['device']}", header, rows)


def print_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the measurements, and the path of their file."""
    print_result(result, [bench_table(result)], console)
