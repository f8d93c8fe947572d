"""`symphony bench`: the cost of the graph at the true layer shapes of large models.

One decoder layer (attention and MoE) of each model runs on T tokens with random weights, in three forms that share
their experts and compute the same routing, so that the experts' work is the same in all of them:

- stock: the family's own router, with the folded weight A W
- symphony: the Symphony router, with W and the graph; in training it also counts, adds both losses, and commits
- folded: the Symphony form after `fold`

They run in alternation in one process, and the ratio is taken within each round. A whole layer's time varies by more
than the graph costs. So the time that the graph adds is also measured on bare layers, without attention and with
experts 8 wide, where it is a large part, and divided by the time of as many whole layers: the rows `training, added`
and `inference, added`, and `watched`, what RoutingMonitor adds to a training step of the stock form that it reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from symphony_hf.errors import ConfigError, nearest
from symphony_hf.results import check_file_place

from .gradient import bench_gradients
from .layer_forms import (
    BARE_LAYERS,
    PROMPT,
    SHAPES,
    build_forms,
    fitting_inputs,
    generation_step,
    inference_step,
    peak_bytes,
    training_step,
    watched,
)
from .layer_rows import AIMS, Measurement, PeakMemory
from .results import write_result
from .timing import Step, alternate, find_device, quartiles, using_threads

BATCHES = (1, 8)
"""Sequences of a generation."""


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
        models: `mixtral-8x7b`, `olmoe-1b-7b`, `qwen3-30b-a3b` or `deepseek-v3-router`; all if None.
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
        ConfigError: If a model, the device or the dtype is unknown, a number is too small, or
            `generate` is given with `router_gradient`.
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
    chosen = find_device(device, "bench")
    kind = dtype or ("float32" if chosen.type == "cpu" else "bfloat16")
    if kind not in ("float32", "bfloat16"):
        raise ConfigError(f"bench: `dtype` is {kind!r}; known names: bfloat16, float32")
    if router_gradient and generate:
        raise ConfigError("bench: `router_gradient` measures training steps alone: leave `generate` out")
    of_layers = {} if router_gradient else {"aims": AIMS, "bare_layers": BARE_LAYERS}
    settings = {"dtype": kind, "seconds_per_row": seconds, **of_layers}
    found: dict[str, list[Any]] = {"gradients": []} if router_gradient else {"rows": [], "memory": []}
    with using_threads(threads), tqdm(total=len(names), desc="bench", unit=" models", disable=None) as bar:
        for name in names:
            if router_gradient:
                found["gradients"] += bench_gradients(name, sizes, chosen, getattr(torch, kind), seconds)
            else:
                whole, bare = (build_forms(name, chosen, getattr(torch, kind), is_bare) for is_bare in (False, True))
                bench = _Bench(name, whole, bare, seconds, found["rows"], bar)
                fitting = dict.fromkeys(bench.forward(size) for size in sizes)
                if generate:
                    bench.generations()
                    found["memory"] += bench.memory(list(fitting))
                del bench, whole, bare  # before the next model is built
            bar.update()
            measured = {key: [dataclasses.asdict(row) for row in rows] for key, rows in found.items()}
            # After each model: an interruption loses one at most.
            result = write_result(output, {**measured, **settings}, chosen)
    return result


class _Bench:
    """Measurements of one model's forms, whole and bare."""

    def __init__(
        self,
        name: str,
        forms: dict[str, PreTrainedModel],
        bare: dict[str, PreTrainedModel],
        seconds: float,
        rows: list[Measurement],
        bar: "tqdm[Any]",
    ) -> None:
        self.name, self.forms, self.bare, self.seconds, self.rows, self.bar = name, forms, bare, seconds, rows, bar
        weight = next(forms["stock"].parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def _inputs(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, SHAPES[self.name]["hidden_size"], device=self.device, dtype=self.dtype)

    def _prompt(self, batch: int) -> Tensor:
        return torch.arange(batch * PROMPT, device=self.device).view(batch, PROMPT) % 7 + 1

    def forward(self, tokens: int) -> int:
        """Measure the forward of a number of tokens, or of half as many until they fit. Returns their number."""
        inputs = fitting_inputs(self.forms["symphony"], tokens)
        tokens = inputs.shape[1]
        for mode, step in (("training", training_step), ("inference", inference_step)):
            whole = self._measure(mode, "symphony", tokens, step, inputs)
            base, other = (functools.partial(step, self.bare[name], inputs) for name in ("stock", "symphony"))
            self._compare(f"{mode}, added", tokens, base, other, whole)
            if mode == "training":
                self._compare("watched", tokens, base, watched(self.bare["stock"], base), whole)
        for mode, form in (("folded", "folded"), ("noise", "stock")):
            self._measure(mode, form, tokens, inference_step, inputs)
        self._measure("training noise", "stock", tokens, training_step, inputs)
        return tokens

    def generations(self) -> None:
        """Measure generation of 1 and of 8 sequences, and its noise."""
        for batch in BATCHES:
            for mode, form in (("generate", "symphony"), ("generate noise", "stock")):
                self._measure(mode, form, batch, generation_step, self._prompt(batch))

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

    def _measure(self, mode: str, form: str, tokens: int, step: Callable[..., None], inputs: Tensor) -> float:
        base, other = (functools.partial(step, self.forms[name], inputs) for name in ("stock", form))
        return self._compare(mode, tokens, base, other)

    def _compare(self, mode: str, tokens: int, base: Step, other: Step, whole: float | None = None) -> float:
        """Measure one step against another. Returns the stock form's seconds.

        Args:
            mode: The row's mode.
            tokens: The row's tokens.
            base: Step of the stock form.
            other: The other step.
            whole: Seconds of the whole layer's stock form, if these are steps of the bare layers.
        """
        self.bar.set_postfix_str(f"{self.name}, {mode}, {tokens}")
        ratios, base_seconds = alternate(base, other, self.seconds, self.device)
        if whole is not None:
            ratios = [1 + (ratio - 1) * base_seconds / (BARE_LAYERS * whole) for ratio in ratios]
        low, median, high = quartiles(ratios)
        seconds = base_seconds if whole is None else whole
        self.rows.append(Measurement(self.name, mode, tokens, len(ratios), median, low, high, seconds))
        return seconds


def measure_layer(name: str, seconds: float, tokens: int = 1024) -> float:
    """Return the median seconds of a stock decoder layer's forward and backward, on the CPU in float32."""
    form = build_forms(name, torch.device("cpu"), torch.float32)["stock"]
    step = functools.partial(training_step, form, torch.randn(1, tokens, SHAPES[name]["hidden_size"]))
    return alternate(step, step, seconds, torch.device("cpu"))[1]
