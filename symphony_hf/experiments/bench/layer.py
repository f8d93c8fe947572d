"""`symphony bench`: the cost of the graph at the true layer shapes of large models.

One decoder layer (attention and MoE) of each model runs on T tokens with random weights, in three forms that share
their experts and compute the same routing, so that the experts' work is the same in all of them:

- stock: the family's own router, with the folded weight A W
- symphony: the Symphony router, with W and the graph; in training it also counts, adds both losses, and commits
- folded: the Symphony form after `fold`

They run in alternation in one process, and the ratio is taken within each round. A fourth row, `watched`, is a training
step of the stock form, with most tokens, that RoutingMonitor reads, as if every step were logged.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from symphony_hf.errors import ConfigError, nearest
from symphony_hf.files import check_file_place
from symphony_hf.tables import Table, TableCell

from .gradient import bench_gradients, gradient_table
from .layer_forms import (
    PROMPT,
    SHAPES,
    build_forms,
    generation_step,
    inference_step,
    peak_bytes,
    training_step,
    watched,
)
from .results import number_cell, print_result, range_cell, write_result
from .timing import Step, alternate, find_device, quartiles, using_threads

AIMS = {
    "training": 1.01,
    "inference": 1.005,
    "folded": 1.0,
    "generate": 1.005,
    "training memory": 1.01,
    "generate memory": 1.01,
}
BATCHES = (1, 8)
"""Sequences of a generation."""


@dataclass(frozen=True)
class Measurement:
    """One measured ratio.

    Attributes:
        model: Model whose layer shapes were used.
        mode: `training` (forward and backward), `inference` or `generate` of the symphony form; `folded`: inference of
            the folded form; `watched`: training of the stock form that RoutingMonitor reads; `noise` and `generate
            noise`: stock against stock.
        tokens: Tokens of one forward; for a generation, its sequences.
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


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of a step.

    Attributes:
        model: Model whose layer shapes were used.
        step: `training` or `generate`.
        tokens: Tokens of one forward; for a generation, its sequences.
        stock_bytes: Bytes of the stock form: its weights, and the peak of what the step allocates.
        bytes: Bytes of the symphony form.
        ratio: Its bytes over stock's.
    """

    model: str
    step: str
    tokens: int
    stock_bytes: int
    bytes: int
    ratio: float


def run_bench(
    models: Sequence[str] | None = None,
    *,
    tokens: int | Sequence[int] = (1024,),
    generate: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    seconds: float = 60.0,
    router_gradient: bool = False,
    output: str | Path = "symphony-bench.json",
) -> dict[str, Any]:
    """Measure every model, and write the result as JSON.

    Args:
        models: Keys of SHAPES, with commas between several; all if None.
        tokens: Tokens of one forward, with commas between several numbers; each is halved until it fits into memory.
        generate: Whether to measure generation with a cache, and the peak memory of a step, too.
        device: Device to measure on; if None, the accelerator, or the CPU if there is none.
        dtype: `float32` or `bfloat16`; if None, float32 on the CPU and bfloat16 elsewhere.
        threads: Threads on the CPU; PyTorch's own number if None. With 1, CPU time is taken, not the clock's.
        seconds: Time for each measurement, after warm-up; at least five rounds are run.
        router_gradient: Measure training steps with experts that were not chosen in the router's gradient instead.
        output: Path of the JSON file.

    Returns:
        The measurements, their settings and the machine.

    Raises:
        ConfigError: If a model, the device or the dtype is unknown, or a number is too small.
    """
    check_file_place(output, "bench")
    names = [name for entry in models or SHAPES for name in entry.split(",")]
    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"bench: unknown model `{name}`; {nearest(name, SHAPES)}")
    sizes = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    for option, values in (("tokens", sizes), ("threads", () if threads is None else (threads,))):
        if min(values, default=1) < 1:
            raise ConfigError(f"bench: `{option}` must be at least 1, got {min(values)}")
    chosen = find_device(device)
    kind = dtype or ("float32" if chosen.type == "cpu" else "bfloat16")
    if kind not in ("float32", "bfloat16"):
        raise ConfigError(f"bench: `dtype` is {kind!r}; known names: bfloat16, float32")
    settings = {"dtype": kind, "seconds_per_row": seconds}
    if router_gradient:
        with using_threads(threads):
            rows_of = [bench_gradients(name, sizes, chosen, getattr(torch, kind), seconds) for name in names]
            gradients = [dataclasses.asdict(row) for rows in rows_of for row in rows]
            return write_result(output, {"gradients": gradients, **settings}, chosen)
    rows: list[Measurement] = []
    memory: list[PeakMemory] = []
    with using_threads(threads), tqdm(total=len(names), desc="bench", unit=" models", disable=None) as bar:
        for name in names:
            bench = _Bench(name, build_forms(name, chosen, getattr(torch, kind)), seconds, rows, bar)
            bench.watched(max([bench.forward(size) for size in sizes]))
            if generate:
                bench.generations()
                memory += bench.memory(sizes)
            del bench  # before the next model is built
            bar.update()
            measured = {
                "rows": [dataclasses.asdict(row) for row in rows],
                "memory": [dataclasses.asdict(row) for row in memory],
                "aims": AIMS,
                **settings,
            }
            result = write_result(output, measured, chosen)  # after each model: an interruption loses one at most
    return result


class _Bench:
    """Measurements of one model's forms."""

    def __init__(
        self, name: str, forms: dict[str, PreTrainedModel], seconds: float, rows: list[Measurement], bar: "tqdm[Any]"
    ) -> None:
        self.name, self.forms, self.seconds, self.rows, self.bar = name, forms, seconds, rows, bar
        weight = next(forms["stock"].parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def _inputs(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, SHAPES[self.name]["hidden_size"], device=self.device, dtype=self.dtype)

    def _prompt(self, batch: int) -> Tensor:
        return torch.arange(batch * PROMPT, device=self.device).view(batch, PROMPT) % 7 + 1

    def forward(self, tokens: int) -> int:
        """Measure the forward of a number of tokens, or of half as many until they fit. Returns their number."""
        inputs = self._fitting(tokens)
        self._measure("training", "symphony", inputs.shape[1], training_step, inputs)
        for mode, form in (("inference", "symphony"), ("folded", "folded"), ("noise", "stock")):
            self._measure(mode, form, inputs.shape[1], inference_step, inputs)
        return inputs.shape[1]

    def watched(self, tokens: int) -> None:
        """Measure a training step of the stock form that is watched."""
        step = functools.partial(training_step, self.forms["stock"], self._inputs(tokens))
        self._compare("watched", tokens, step, watched(self.forms["stock"], step))

    def generations(self) -> None:
        """Measure generation of 1 and of 8 sequences, and its noise."""
        for batch in BATCHES:
            self._measure("generate", "symphony", batch, generation_step, self._prompt(batch))
        self._measure("generate noise", "stock", BATCHES[0], generation_step, self._prompt(BATCHES[0]))

    def memory(self, sizes: Sequence[int]) -> Iterator[PeakMemory]:
        """Measure the peak memory of a training step and of a generation, whose steps decode a token."""
        steps: list[tuple[str, int, Callable[..., None], Tensor]] = [
            ("training", size, training_step, self._inputs(size)) for size in sizes
        ]
        steps += [("generate", batch, generation_step, self._prompt(batch)) for batch in BATCHES]
        for step, tokens, run, inputs in steps:
            stock, symphony = (
                peak_bytes(self.forms[form], functools.partial(run, self.forms[form], inputs))
                for form in ("stock", "symphony")
            )
            yield PeakMemory(self.name, step, tokens, stock, symphony, symphony / stock)

    def _measure(self, mode: str, form: str, tokens: int, step: Callable[..., None], inputs: Tensor) -> None:
        base, other = (functools.partial(step, self.forms[name], inputs) for name in ("stock", form))
        self._compare(mode, tokens, base, other)

    def _compare(self, mode: str, tokens: int, base: Step, other: Step) -> None:
        self.bar.set_postfix_str(f"{self.name}, {mode}, {tokens}")
        ratios, stock_seconds = alternate(base, other, self.seconds, self.device)
        low, median, high = quartiles(ratios)
        self.rows.append(Measurement(self.name, mode, tokens, len(ratios), median, low, high, stock_seconds))

    def _fitting(self, tokens: int) -> Tensor:
        while True:
            inputs = self._inputs(tokens)
            try:
                training_step(self.forms["symphony"], inputs)
                return inputs
            except (torch.OutOfMemoryError, MemoryError):
                if tokens == 1:
                    raise
            except RuntimeError as error:
                if "can't allocate memory" not in str(error) or tokens == 1:  # the message of PyTorch's CPU allocator
                    raise
            tokens //= 2


def measure_layer(name: str, seconds: float, tokens: int = 1024) -> float:
    """Return the median seconds of a stock decoder layer's forward and backward, on the CPU in float32."""
    form = build_forms(name, torch.device("cpu"), torch.float32)["stock"]
    step = functools.partial(training_step, form, torch.randn(1, tokens, SHAPES[name]["hidden_size"]))
    return alternate(step, step, seconds, torch.device("cpu"))[1]


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


def memory_table(result: dict[str, Any]) -> Table:
    """Return the peak memory of a result as a table."""
    rows: list[list[TableCell | str]] = [
        [
            row["model"],
            row["step"],
            number_cell(row["tokens"], "d"),
            number_cell(row["ratio"], ".4f"),
            number_cell(row["stock_bytes"] / 1e9, ".3f"),
            number_cell(result["aims"][f"{row['step']} memory"], "g"),
        ]
        for row in result["memory"]
    ]
    return Table("Peak memory over stock", ["model", "step", "tokens", "ratio", "stock, GB", "aim"], rows)


def print_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the measurements, and the path of their file."""
    if "gradients" in result:
        return print_result(result, [gradient_table(result)], console)
    tables = [bench_table(result), *([memory_table(result)] if result["memory"] else [])]
    print_result(result, tables, console)
