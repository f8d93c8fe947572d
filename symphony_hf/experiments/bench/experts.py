"""`symphony bench-experts`: UpcycledMoE against a loop over experts, at the true shapes that LLaVA's recipe upcycles.

The loop is the form common in research code: a list of MLPs, each run on the tokens that chose it, with the outputs
added by index. Both have the same weights and the same router, and compute the same. The experts' matrix products,
which every form needs, are also timed alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from symphony_hf.models.dense_mlp import MlpParts
from symphony_hf.models.upcycled_moe import UpcycledMoE
from symphony_hf.results import check_file_place
from symphony_hf.settings import check_least
from symphony_hf.tables import Table

from .results import number_cell, print_result, range_cell, write_result
from .timing import alternate, find_device, quartiles

SHAPES = {"projector": (1024, 3072, 3072, "gelu", 576), "clip mlp": (1024, 4096, 1024, "quick_gelu", 577)}
"""Input, inner and output sizes, activation, and tokens per image."""
NUM_EXPERTS, TOP_K = 6, 3


@dataclass(frozen=True)
class ExpertsMeasurement:
    """One form, at one shape.

    Attributes:
        shape: A key of SHAPES.
        form: `eager` (our own, sorted by expert), `grouped_mm` (transformers', if the output is as wide as the input),
            or `products` (the experts' matrix products alone).
        tokens: Tokens of one step.
        rounds: Number of rounds.
        speedup: Median over rounds of the loop's time over this form's, forward and backward.
        low: 25th percentile of these ratios.
        high: 75th percentile of these ratios.
        tokens_per_second: Throughput of this form: the loop's times the speedup.
        loop_tokens_per_second: Throughput of the loop.
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
    """The router of a layer and a copy of its experts in a list, run one by one, with outputs added by index."""

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
            tokens, slots = torch.where(indices_TK == expert)
            result = down(self.act_fn(up(hidden_states[tokens])))
            output.index_add_(0, tokens, result * weights_TK[tokens, slots, None])
        return output


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def build_experts(shape: str, implementation: str, device: torch.device, dtype: torch.dtype) -> UpcycledMoE:
    """Build an UpcycledMoE of one of SHAPES with random experts, under an experts implementation of transformers."""
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
    """Measure every form at every shape, forward and backward, and write the result as JSON.

    Args:
        output: Path of the JSON file.
        images: Number of images whose tokens make one step.
        device: Device to measure on; if None, the accelerator, or the CPU if there is none. Weights are float32 on the
            CPU, bfloat16 elsewhere.
        seconds: Time for each measurement, after warm-up; at least five rounds are run.

    Returns:
        The measurements, their settings and the machine.

    Raises:
        ConfigError: If the device is not available, or `images` is below 1.
    """
    check_file_place(output, "bench-experts")
    check_least("bench-experts", 1, images=images)
    chosen = find_device(device, "bench-experts")
    dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    forms = [
        (shape, form)
        for shape, (hidden_size, _, output_size, *_) in SHAPES.items()
        for form in ("eager", "grouped_mm", "products")
        if form != "grouped_mm" or hidden_size == output_size
    ]
    rows = [
        _measure_form(shape, form, images, chosen, dtype, seconds)
        for shape, form in tqdm(forms, desc="bench-experts", unit=" rows", disable=None)
    ]
    values = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return write_result(output, values, chosen)


def _measure_form(
    shape: str, form: str, images: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> ExpertsMeasurement:
    moe = build_experts(shape, "eager" if form == "products" else form, device, dtype)
    hidden_size, _, _, _, tokens_per_image = SHAPES[shape]
    inputs = torch.randn(images * tokens_per_image, hidden_size, device=device, dtype=dtype)
    step = functools.partial(_step, moe, inputs) if form != "products" else _products(moe, inputs)
    times, loop_seconds = alternate(functools.partial(_step, ExpertsLoop(moe), inputs), step, seconds, device)
    low, median, high = quartiles([1 / ratio for ratio in times])
    speed = len(inputs) / loop_seconds
    return ExpertsMeasurement(shape, form, len(inputs), len(times), median, low, high, median * speed, speed)


def _step(module: nn.Module, inputs: Tensor) -> None:
    module(inputs.requires_grad_()).float().square().mean().backward()
    module.zero_grad(set_to_none=True)
    inputs.grad = None


@torch.no_grad()
def _products(moe: UpcycledMoE, inputs: Tensor) -> Callable[[], None]:
    """Return a step of the experts' matrix products alone, at the sizes that the routing gives them."""
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


def experts_table(result: dict[str, Any]) -> Table:
    """Return the measurements of a result as a table."""
    rows = [
        [
            row["shape"],
            row["form"],
            number_cell(row["tokens"], "d"),
            number_cell(row["speedup"], ".2f"),
            range_cell(row["low"], row["high"], ".2f"),
            number_cell(row["tokens_per_second"], ".0f"),
        ]
        for row in result["rows"]
    ]
    title = (
        f"Speed over a loop over experts, {result['experts']} experts, top-{result['top_k']}, forward and backward, "
        f"{result['dtype']} on {result['device']}, threads: {result['threads']}"
    )
    return Table(title, ["shape", "form", "tokens", "speedup", "quartiles", "tokens/s"], rows)


def print_bench_experts(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the measurements, and the path of their file."""
    print_result(result, [experts_table(result)], console)
