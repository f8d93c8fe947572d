"""Measurement of one case (a model in a mode at a length): its forms are warmed up and timed in alternation."""

import gc
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from symphony_hf.errors import EvaluationError
from symphony_hf.experiments.bench.timing import WARM_UP, Limits, Step, Timings, quartiles, run_rounds, warm_up

from .flops import model_flops
from .forms import inference_forms, make_optimizer, optimizer_name, prefill_step, training_forms, training_step
from .memory import GIB, Estimate, estimate, fitting_micro_batch, parameter_shapes
from .record import FormMeasurement
from .shapes import Inputs, build, config_of, image_tokens, random_batch


@dataclass(frozen=True)
class Case:
    """A model of `shapes.NAMES` in a mode of `flops.MODES`, with sequences of so many text tokens besides an image."""

    model: str
    mode: str
    text_tokens: int
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.mode}, {self.text_tokens} tokens of text"


@dataclass(frozen=True)
class Device:
    """The device to measure on, with the dtype of the weights, its free memory at the start and its peak, if known."""

    name: str
    device: torch.device
    dtype: torch.dtype
    free_bytes: float | None
    peak_tflops: float | None


class DoesNotFitError(Exception):
    """A case needs more memory than the device has."""


def measure(case: Case, device: Device, max_tokens: int, limits: Limits) -> list[FormMeasurement]:
    """Measure a case with the largest micro-batch that fits. Returns one row per form.

    Raises:
        DoesNotFitError: If not even one sequence fits.
        TimeIsUpError: If the time of the run ends before there are enough rounds.
        EvaluationError: If a step's output is not finite.
    """
    limits.check()
    config = config_of(case.model, case.tiny)
    shapes, optimizer = parameter_shapes(config), optimizer_name(case.mode)

    def needs(sequences: int) -> Estimate:
        inputs = Inputs(sequences, case.text_tokens)
        return estimate(config, shapes, case.mode, optimizer, device.dtype, inputs)

    limit = max_tokens // (case.text_tokens + image_tokens(config))
    micro_batch = fitting_micro_batch(lambda sequences: needs(sequences).total, limit, device.free_bytes)
    found = "" if micro_batch else "by the estimate, "
    while micro_batch > 0:
        try:
            return _measure(case, device, micro_batch, needs(micro_batch), limits)
        except torch.OutOfMemoryError:
            micro_batch //= 2
        # Not in the handler, where the exception still references the tensors.
        gc.collect()
        torch.cuda.empty_cache()
    free = (device.free_bytes or 0) / GIB
    raise DoesNotFitError(f"{found}one sequence does not fit: it needs about {needs(1)}, and {free:.1f} GiB were free")


def _measure(case: Case, device: Device, micro_batch: int, needed: Estimate, limits: Limits) -> list[FormMeasurement]:
    model = build(config_of(case.model, case.tiny), device.device, device.dtype)
    steps = make_steps(model, case.mode, Inputs(micro_batch, case.text_tokens))
    with tqdm(total=(WARM_UP + limits.rounds) * len(steps), desc=str(case), leave=False, disable=None) as bar:
        warm_up(steps, limits, bar.update)
        timings = run_rounds(steps, device.device, limits, bar.update)
    _check_outputs(case, timings)
    return rows_of(case, device, micro_batch, needed, timings)


def make_steps(model: PreTrainedModel, mode: str, inputs: Inputs) -> dict[str, Step]:
    """Return the step of each form: `stock`, `symphony`, in inference `folded`, and `noise`, which is stock again."""
    batch, steps = random_batch(model, inputs), {}
    name = optimizer_name(mode)
    if name is None:
        for form, variant in inference_forms(model).items():
            steps[form] = partial(prefill_step, variant, batch)
    else:
        forms = training_forms(model, mode)
        optimizer = make_optimizer(name, forms)
        for form, variant in forms.items():
            steps[form] = partial(training_step, variant, batch, optimizer, has_graphs=form == "symphony")
    return {**steps, "noise": steps["stock"]}


def _check_outputs(case: Case, timings: Timings) -> None:
    for form, output in timings.outputs.items():
        if not math.isfinite(float(output)):
            raise EvaluationError(
                f"{case}: the last step of the {form} form returned {float(output)}, so its times are meaningless"
            )


def rows_of(case: Case, device: Device, micro_batch: int, needed: Estimate, timings: Timings) -> list[FormMeasurement]:
    """Return the measurements of a case, one per form."""
    config = config_of(case.model, case.tiny)
    tokens = case.text_tokens + image_tokens(config)
    teraflops = micro_batch * model_flops(config, case.mode, case.text_tokens) / 1e12
    rows = []
    for form, times in timings.seconds.items():
        seconds, peak = float(np.median(times)), timings.peak_bytes.get(form)
        ratios = None if form == "stock" else quartiles(timings.ratios(form, "stock"))
        low, median, high = ratios or (None, None, None)
        rows.append(
            FormMeasurement(
                model=case.model,
                mode=case.mode,
                text_tokens=case.text_tokens,
                tokens=tokens,
                micro_batch=micro_batch,
                optimizer=optimizer_name(case.mode),
                form=form,
                rounds=len(times),
                milliseconds=1000 * seconds,
                tokens_per_second=micro_batch * tokens / seconds,
                peak_gib=None if peak is None else peak / GIB,
                estimated_gib=needed.total / GIB,
                teraflops=teraflops,
                utilization=device.peak_tflops and teraflops / seconds / device.peak_tflops,
                ratio=median,
                low=low,
                high=high,
            )
        )
    return rows
