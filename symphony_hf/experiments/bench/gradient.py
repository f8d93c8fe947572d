"""`symphony bench --router_gradient`: the cost of experts that were not chosen in the router's gradient.

One decoder layer at the true shape of each model trains in forms that share all parameters. `chosen`, the base of the
ratios, is the Symphony layer with the stock gradient. The others run more experts in the backward pass.
"""

import copy
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from symphony_hf.experiments.conformance.specimen import put_random_graphs
from symphony_hf.patching.families.discovery import find_routers
from symphony_hf.patching.symphonize import symphonize
from symphony_hf.tables import Table, TableCell

from .layer_forms import build_forms, fitting_inputs, peak_bytes, training_step
from .results import number_cell, range_cell
from .timing import Limits, Step, quartiles, run_rounds, warm_up

NUM_NEIGHBOURS = (1, 2, 4, 8)
"""Values of `num_neighbours`; those of which a model has too few experts are left out."""


@dataclass(frozen=True)
class GradientMeasurement:
    """One form of the gradient.

    Attributes:
        model: Model whose layer shapes were used.
        gradient: `router_gradient`, with `num_neighbours` where it has any.
        tokens: Tokens of one step.
        rounds: Number of rounds.
        experts: Runs of an expert's forward over those of the chosen ones: (K + n) / K.
        ratio: Median over rounds of a training step's time over that of `chosen` in the same round.
        low: 25th percentile of these ratios.
        high: 75th percentile of these ratios.
        chosen_seconds: Median time of a step of `chosen`.
        memory: Bytes over those of `chosen`: of the weights, and of what a step allocates at its peak.
    """

    model: str
    gradient: str
    tokens: int
    rounds: int
    experts: float
    ratio: float
    low: float
    high: float
    chosen_seconds: float
    memory: float


def build_gradient_forms(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[PreTrainedModel, int]]:
    """Build a decoder layer with each form of the gradient. They share all parameters, with random graphs.

    Returns:
        By form, the model and the number of other experts that take part for each token.
    """
    base = build_forms(name, device, dtype)["stock"]
    router = find_routers(base)[0].contract
    settings: dict[str, tuple[dict[str, Any], int]] = {"chosen": ({}, 0)}
    num_others = router.num_experts - router.top_k
    for n in NUM_NEIGHBOURS:
        if n <= num_others:
            settings[f"neighbours, {n}"] = ({"router_gradient": "neighbours", "num_neighbours": n}, n)
    settings["dense"] = ({"router_gradient": "dense"}, num_others)
    forms = {}
    for form, (values, n) in settings.items():
        model = symphonize(copy.deepcopy(base, memo={id(p): p for p in base.parameters()}), strength=0, **values)
        forms[form] = put_random_graphs(model), n  # a fresh graph has no neighbours
    return forms


def bench_gradients(
    name: str, sizes: Sequence[int], device: torch.device, dtype: torch.dtype, seconds: float
) -> list[GradientMeasurement]:
    """Time the forms of one model in alternation, and measure their memory.

    Args:
        name: Key of `layer_forms.SHAPES`.
        sizes: Numbers of tokens of a step, each halved until it fits into memory.
        device: Device to measure on.
        dtype: Type of the weights.
        seconds: Time for the rounds of each number of tokens.
    """
    forms = build_gradient_forms(name, device, dtype)
    dense, _ = forms["dense"]  # of all forms, it needs the most memory
    fitting = {inputs.shape[1]: inputs for inputs in (fitting_inputs(dense, size) for size in sizes)}
    return [row for inputs in fitting.values() for row in _bench_inputs(name, forms, inputs, seconds)]


def _bench_inputs(
    name: str, forms: dict[str, tuple[PreTrainedModel, int]], inputs: Tensor, seconds: float
) -> Iterator[GradientMeasurement]:
    steps: dict[str, Step] = {
        form: functools.partial(training_step, model, inputs) for form, (model, _) in forms.items()
    }
    limits = Limits(sys.maxsize, seconds, math.inf)
    warm_up(steps, limits, lambda: None)
    timings = run_rounds(steps, inputs.device, limits, lambda: None)
    top_k = forms["chosen"][0].config.num_experts_per_tok
    peaks = {form: peak_bytes(model, steps[form]) for form, (model, _) in forms.items()}
    for form, (_, num_others) in forms.items():
        low, median, high = quartiles(timings.ratios(form, "chosen"))
        yield GradientMeasurement(
            model=name,
            gradient=form,
            tokens=inputs.shape[1],
            rounds=len(timings.seconds[form]),
            experts=(top_k + num_others) / top_k,
            ratio=median,
            low=low,
            high=high,
            chosen_seconds=float(np.median(timings.seconds["chosen"])),
            memory=peaks[form] / peaks["chosen"],
        )


def gradient_table(result: dict[str, Any]) -> Table:
    """Return the measurements of a result as a table."""
    header = ["model", "router gradient", "tokens", "experts run", "ratio", "quartiles", "rounds", "peak memory"]
    rows: list[list[TableCell | str]] = [
        [
            row["model"],
            row["gradient"],
            number_cell(row["tokens"], "d"),
            number_cell(row["experts"], ".2f"),
            number_cell(row["ratio"], ".3f"),
            range_cell(row["low"], row["high"], ".3f"),
            number_cell(row["rounds"], "d"),
            number_cell(row["memory"], ".3f"),
        ]
        for row in result["gradients"]
    ]
    title = f"Training step over that of `chosen`, one decoder layer, {result['dtype']} on {result['device']}"
    return Table(title, header, rows)
