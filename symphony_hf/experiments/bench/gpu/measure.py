"""Benchmark of the graph's cost on a GPU: full-size models, stock and symphonized, timed in alternation.

Run `python -m symphony_hf.experiments.bench.gpu.measure`. The README.md of the bench explains the results.
"""

import argparse
import gc
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from symphony_hf.compat import versions
from symphony_hf.errors import SymphonyError
from symphony_hf.experiments.bench.timing import Limits, TimeIsUpError

from .case import Case, Device, DoesNotFitError, measure
from .flops import MODES, idle_parameters, peak_tflops
from .memory import parameter_shapes
from .record import Record, header, line_of
from .shapes import NAMES, config_of, image_tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code: 1 if nothing could be measured."""
    options = parse(arguments)
    end = time.perf_counter() + 60 * options.minutes
    transformers.logging.set_verbosity_error()
    # The oldest supported transformers has only the old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    try:
        return run(options, end)
    except SymphonyError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. An invalid one ends the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", choices=NAMES, nargs="+", default=NAMES, help="both by default")
    add("--mode", choices=MODES, nargs="+", default=MODES, help="all by default")
    add(
        "--text_tokens",
        type=int,
        nargs="+",
        help="text tokens in a sequence; 512 and 2048 by default",
    )
    add("--max_tokens", type=int, default=8192, help="maximum number of tokens in a step")
    add("--steps", type=int, default=20, help="steps of each form, after warm-up")
    add("--seconds", type=float, default=90.0, help="time for the steps of a case; at least five are run")
    add("--minutes", type=float, default=8.0, help="time for the whole run; the next run continues from there")
    add("--peak_tflops", type=float, help="dense bfloat16 peak of the device; known for A100, H100 and H200")
    add("--output", type=Path, default=Path("gpu.json"), help="result file; cases in it are not measured again")
    add("--tiny", action="store_true", help="tiny models on the CPU, to test the script")
    options = parser.parse_args(arguments)
    for name in ("max_tokens", "steps", "seconds", "minutes", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} must be above 0, got {value}")
    options.text_tokens = options.text_tokens or ([16, 32] if options.tiny else [512, 2048])
    for config in (config_of(name, options.tiny) for name in options.model):
        most = config.get_text_config().max_position_embeddings - image_tokens(config)
        if not all(2 <= length <= most for length in options.text_tokens):
            parser.error(f"--text_tokens must be from 2 to {most} ({config.model_type}), got {options.text_tokens}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny runs tiny models on the CPU")
    return options


def run(options: argparse.Namespace, end: float) -> int:
    """Measure the cases that are not in the file yet, until the time is up."""
    device = find_device(options)
    record = Record(options.output, measured_on(options, device))
    for name in options.model:
        config = config_of(name, options.tiny)
        parameters = sum(map(math.prod, parameter_shapes(config)))
        record.note_model(name, parameters, parameters - idle_parameters(config))
    tqdm.write("\n".join([header(), *map(line_of, record.rows)]))
    limits = Limits(options.steps, options.seconds, end)
    asked = [(name, mode, length) for name in options.model for mode in options.mode for length in options.text_tokens]
    for which in asked:
        if record.has(*which):
            continue
        try:
            rows = measure(Case(*which, options.tiny), device, options.max_tokens, limits)
        except (DoesNotFitError, TimeIsUpError) as reason:
            record.leave_out(*which, str(reason))
        else:
            record.add(rows)
            tqdm.write("\n".join(map(line_of, rows)))
        gc.collect()  # a model and its graphs are a reference cycle
        if device.device.type == "cuda":
            torch.cuda.empty_cache()
    for line in record.left_out():
        tqdm.write(line)
    tqdm.write(f"written to {options.output.resolve()}")
    return 0 if record.rows else 1


def find_device(options: argparse.Namespace) -> Device:
    """Return the CPU, in float32, for tiny models; otherwise the GPU, in bfloat16."""
    if options.tiny:
        return Device("cpu", torch.device("cpu"), torch.float32, None, options.peak_tflops)
    name, free_bytes = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    return Device(name, torch.device("cuda"), torch.bfloat16, free_bytes, options.peak_tflops or peak_tflops(name))


def measured_on(options: argparse.Namespace, device: Device) -> dict[str, Any]:
    """Return what the measurements depend on besides the case."""
    return {
        "device": device.name,
        "dtype": str(device.dtype).removeprefix("torch."),
        "peak_tflops": device.peak_tflops,
        "max_tokens": options.max_tokens,
        "tiny": options.tiny,
        "versions": versions("peft"),
    }


if __name__ == "__main__":
    sys.exit(main())
