"""One case, a model in a mode at a length: its forms are built, warmed up, and timed in alternation."""

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
from .memory import GIB, Estimate, count_parameters, estimate, fitting_micro_batch
from .record import Measurement
from .shapes import Inputs, build, config_of, image_tokens, random_batch


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: One of `shapes.NAMES`.
        mode: One of `flops.MODES`.
        text_tokens: Of a sequence; an image's come on top.
        tiny: Whether the model is a tiny one of the same kind.
    """

    model: str
    mode: str
    text_tokens: int
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.mode}, {self.text_tokens} tokens of text"


@dataclass(frozen=True)
class Place:
    """Where it is measured.

    Attributes:
        name: Of the device.
        device: One GPU, or the CPU.
        dtype: Of the weights.
        free_bytes: That the device had at the start; None where there is no bound.
        peak_tflops: Of the device; None where it is not known.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    free_bytes: float | None
    peak_tflops: float | None


class DoesNotFitError(Exception):
    """The device has too little memory for a case."""


def measure(case: Case, place: Place, max_tokens: int, limits: Limits) -> list[Measurement]:
    """Measure a case, with the largest micro-batch that fits.

    Args:
        case: What.
        place: Where.
        max_tokens: Of a step.
        limits: When to stop.

    Returns:
        A row of each form.

    Raises:
        DoesNotFitError: If not even one sequence fits.
        TimeIsUpError: If the run's time ends before there are enough rounds.
        EvaluationError: If a step's output is not finite.
    """
    limits.check()
    config = config_of(case.model, case.tiny)
    parameters, optimizer = count_parameters(config), optimizer_name(case.mode)

    def needs(sequences: int) -> Estimate:
        inputs = Inputs(sequences, case.text_tokens)
        return estimate(config, parameters, case.mode, optimizer, place.dtype, inputs)

    most = max_tokens // (case.text_tokens + image_tokens(config))
    micro_batch = fitting_micro_batch(lambda sequences: needs(sequences).total, most, place.free_bytes)
    found = "" if micro_batch else "by the estimate, "
    while micro_batch > 0:
        try:
            return _measure(case, place, micro_batch, needs(micro_batch), limits)
        except torch.OutOfMemoryError:
            micro_batch //= 2
        # Here, not above: until then the exception holds what was under way.
        gc.collect()
        torch.cuda.empty_cache()
    free = (place.free_bytes or 0) / GIB
    raise DoesNotFitError(f"{found}one sequence does not fit: about {needs(1)} of {free:.1f} GiB that were free")


def _measure(case: Case, place: Place, micro_batch: int, needed: Estimate, limits: Limits) -> list[Measurement]:
    model = build(config_of(case.model, case.tiny), place.device, place.dtype)
    steps = make_steps(model, case.mode, Inputs(micro_batch, case.text_tokens))
    with tqdm(total=(WARM_UP + limits.rounds) * len(steps), desc=str(case), leave=False, disable=None) as bar:
        warm_up(steps, limits, bar.update)
        timings = run_rounds(steps, place.device, limits, bar.update)
    _check_outputs(case, timings)
    return rows_of(case, place, micro_batch, needed, timings)


def make_steps(model: PreTrainedModel, mode: str, inputs: Inputs) -> dict[str, Step]:
    """What is timed, by form: `stock`, `symphony`, in inference `folded`, and `noise`, which is stock again."""
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
                f"{case}: the {form} form's last step gave {float(output)}: times of what is not finite say nothing"
            )


def rows_of(case: Case, place: Place, micro_batch: int, needed: Estimate, timings: Timings) -> list[Measurement]:
    """What was timed, as rows."""
    config = config_of(case.model, case.tiny)
    tokens = case.text_tokens + image_tokens(config)
    teraflops = micro_batch * model_flops(config, case.mode, case.text_tokens) / 1e12
    rows = []
    for form, times in timings.seconds.items():
        seconds, peak = float(np.median(times)), timings.peak_bytes.get(form)
        ratios = None if form == "stock" else quartiles(timings.ratios(form, "stock"))
        low, median, high = ratios or (None, None, None)
        rows.append(
            Measurement(
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
                utilization=place.peak_tflops and teraflops / seconds / place.peak_tflops,
                ratio=median,
                low=low,
                high=high,
            )
        )
    return rows
