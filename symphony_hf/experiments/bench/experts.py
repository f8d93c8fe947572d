"""`symphony bench-experts`: UpcycledMoE against a loop over experts, at the true shapes that LLaVA's recipe upcycles.

The loop is the form that research code uses: a list of MLPs, each run on the tokens that chose it, its outputs added by
index. Both have the same weights and the same router, and compute the same. Beside them the experts' matrix products
alone are timed, which no form can do without.
"""

import dataclasses
import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from symphony_hf.compat import __version__, transformers_version
from symphony_hf.errors import ConfigError
from symphony_hf.files import check_file_place, write_json
from symphony_hf.models.dense_mlp import MlpParts
from symphony_hf.models.upcycled_moe import UpcycledMoE

from .layer import alternate, find_device

SHAPES = {"projector": (1024, 3072, 3072, "gelu", 576), "clip mlp": (1024, 4096, 1024, "quick_gelu", 577)}
"""Input, inner and output size, activation, and tokens of an image."""
NUM_EXPERTS, TOP_K = 6, 3


@dataclass(frozen=True)
class ExpertsRow:
    """One form, at one shape.

    Attributes:
        shape: A key of SHAPES.
        form: `eager` (sorted by expert, our own), `grouped_mm` (transformers', where the output is as wide as the
            input), or `products` (the experts' matrix products alone).
        tokens: Of one step.
        rounds: How many ratios the median is of.
        speedup: Median over rounds of the loop's time over this form's, forward and backward.
        low: Their 25th percentile.
        high: Their 75th percentile.
        tokens_per_second: Of this form, the loop's at the speedup's median.
        loop_tokens_per_second: Of the loop.
    """

    shape: str
    form: str
    tokens: int
    rounds: int
    speedup: float
    low: float
    high: float
    tokens_per_second: float
    loop_tokens_per_second: float


class ExpertsLoop(nn.Module):
    """The same experts in a list, run one after the other, and added up by index.

    Args:
        moe: Whose weights and router it takes; the experts' weights are copied.
    """

    def __init__(self, moe: UpcycledMoE) -> None:
        super().__init__()
        self.gate = moe.gate
        self.act_fn = moe.experts.act_fn
        ups: tuple[Any, ...] = tuple(getattr(moe.experts, name) for name in ("up_proj", "up_proj_bias"))
        downs: tuple[Any, ...] = tuple(getattr(moe.experts, name) for name in ("down_proj", "down_proj_bias"))
        self.up = nn.ModuleList(_linear(weight, bias) for weight, bias in zip(*ups, strict=True))
        self.down = nn.ModuleList(_linear(weight, bias) for weight, bias in zip(*downs, strict=True))
        self.output_size = downs[0].shape[1]

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weights_TK, indices_TK = self.gate(hidden_states)
        output = hidden_states.new_zeros(len(hidden_states), self.output_size)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            tokens, places = torch.where(indices_TK == expert)
            result = down(self.act_fn(up(hidden_states[tokens])))
            output.index_add_(0, tokens, result * weights_TK[tokens, places, None])
        return output


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def build_experts(shape: str, implementation: str, device: torch.device, dtype: torch.dtype) -> UpcycledMoE:
    """An UpcycledMoE of one of SHAPES, with experts that differ and an implementation of their own."""
    hidden_size, inner_size, output_size, act, _ = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        up, down = nn.Linear(hidden_size, inner_size, dtype=dtype), nn.Linear(inner_size, output_size, dtype=dtype)
    config = PreTrainedConfig()
    config._experts_implementation = implementation
    moe = UpcycledMoE(MlpParts("plain", (up,), down, ACT2FN[act]), NUM_EXPERTS, TOP_K, config=config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=hidden_size**-0.5)
    return moe


def run_bench_experts(
    output: str | Path = "symphony-bench-experts.json",
    *,
    images: int = 4,
    device: str | None = None,
    seconds: float = 30.0,
) -> dict[str, Any]:
    """Measure every form at every shape, forward and backward, and write the rows as JSON.

    Args:
        output: The JSON file.
        images: Whose tokens make one step.
        device: See `find_device`. Weights are float32 on the CPU, bfloat16 elsewhere.
        seconds: Time for each row, after warm-up; at least five rounds are run.

    Returns:
        The rows, and what they were measured on.

    Raises:
        ConfigError: If the device is not to be had, or there are no images.
    """
    check_file_place(output, "bench-experts")
    if images < 1:
        raise ConfigError(f"bench-experts: `images` must be at least 1, got {images}")
    place = find_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    forms = [
        (shape, form)
        for shape, (hidden_size, _, output_size, *_) in SHAPES.items()
        for form in ("eager", "grouped_mm", "products")
        if form != "grouped_mm" or hidden_size == output_size
    ]
    rows = [
        _measure_form(shape, form, images, place, dtype, seconds)
        for shape, form in tqdm(forms, desc="bench-experts", unit=" rows", disable=None)
    ]
    result = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "device": torch.cuda.get_device_name() if place.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"symphony_hf": __version__, "torch": torch.__version__, "transformers": transformers_version()},
        "output": str(output),
    }
    write_json(Path(output), result)
    return result


def _measure_form(
    shape: str, form: str, images: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> ExpertsRow:
    moe = build_experts(shape, "eager" if form == "products" else form, device, dtype)
    hidden_size, _, _, _, tokens_per_image = SHAPES[shape]
    inputs = torch.randn(images * tokens_per_image, hidden_size, device=device, dtype=dtype)
    step = functools.partial(_step, moe, inputs) if form != "products" else _products(moe, inputs)
    times, loop_seconds = alternate(functools.partial(_step, ExpertsLoop(moe), inputs), step, seconds, device)
    low, median, high = np.percentile([1 / ratio for ratio in times], [25, 50, 75])
    speed = len(inputs) / loop_seconds
    return ExpertsRow(
        shape, form, len(inputs), len(times), float(median), float(low), float(high), float(median) * speed, speed
    )


def _step(module: nn.Module, inputs: Tensor) -> None:
    module(inputs.requires_grad_()).float().square().mean().backward()
    module.zero_grad(set_to_none=True)
    inputs.grad = None


@torch.no_grad()
def _products(moe: UpcycledMoE, inputs: Tensor) -> Callable[[], None]:
    """The experts' matrix products of a step, each as large as the routing makes it."""
    ups, downs = moe.experts.get_parameter("up_proj").detach(), moe.experts.get_parameter("down_proj").detach()
    lengths = torch.bincount(moe.gate(inputs)[2].reshape(-1), minlength=NUM_EXPERTS).tolist()
    x, inner = inputs.detach()[: max(lengths)], torch.randn(max(lengths), ups.shape[1]).to(ups)
    grad = torch.randn(max(lengths), downs.shape[1]).to(ups)

    def run() -> None:
        with torch.inference_mode():
            for up, down, n in zip(ups, downs, lengths, strict=True):
                F.linear(x[:n], up), F.linear(inner[:n], down)
                grad[:n].T @ inner[:n], grad[:n] @ down, inner[:n].T @ x[:n], inner[:n] @ up

    return run


def print_bench_experts(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows as a table, and where the JSON is."""
    console = console or Console()
    title = (
        f"Speed over a loop over experts, {result['experts']} experts, top-{result['top_k']}, forward and backward, "
        f"{result['dtype']} on {result['device']}, threads: {result['threads']}"
    )
    table = Table(title=title, title_justify="left")
    header, *rows = experts_table(result)
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Written to {Path(result['output']).resolve()}", highlight=False, soft_wrap=True)


def experts_table(result: dict[str, Any]) -> list[list[str]]:
    """The rows of a result as text, header first."""
    table = [["shape", "form", "tokens", "speedup", "quartiles", "tokens/s"]]
    for row in result["rows"]:
        numbers = [f"{row['speedup']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
        table.append([row["shape"], row["form"], str(row["tokens"]), *numbers, f"{row['tokens_per_second']:.0f}"])
    return table
