"""Timing of steps in alternation: in each round every form runs once, in an order that turns from round to round."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from symphony_hf.errors import ConfigError

MIN_ROUNDS = 5
"""Minimum number of rounds: fewer ratios have no meaningful quartiles."""

DECAY = 0.999999
"""Decay of the graphs in training. They are updated at every step, at their full cost, but change so little that the
routing, and with it the work of the experts, stays that of the stock form."""

WARM_UP = 3
"""Untimed steps of each form, which choose kernels, grow the memory pool and create optimizer states."""

Step = Callable[[], Any]


class TimeIsUpError(Exception):
    """The time for the whole run ended before a case had enough rounds."""


@dataclass
class Timings:
    """Measurements of all rounds, by form.

    Attributes:
        seconds: Time of each step, in the order of the rounds.
        peak_bytes: Peak memory of a step; empty on a CPU.
        outputs: Return values of the last steps.
    """

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    def ratios(self, form: str, base: str) -> list[float]:
        """Return the ratio of one form's time to another's, within each round."""
        return [mine / other for mine, other in zip(self.seconds[form], self.seconds[base], strict=True)]


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        rounds: Maximum number of rounds.
        seconds: Time for these rounds; MIN_ROUNDS are run even if they take longer.
        end: `time.perf_counter()` at which the whole run stops.
    """

    rounds: int
    seconds: float
    end: float

    def check(self) -> None:
        """Raise TimeIsUpError once the run's time is over."""
        if time.perf_counter() >= self.end:
            raise TimeIsUpError("the time was up")


def warm_up(steps: dict[str, Step], limits: Limits, tick: Callable[[], object]) -> None:
    """Run each form a few times, untimed.

    Raises:
        TimeIsUpError: If the run's time ends meanwhile.
    """
    for _ in range(WARM_UP):
        for step in steps.values():
            limits.check()
            step()
            tick()


def run_rounds(steps: dict[str, Step], device: torch.device, limits: Limits, tick: Callable[[], object]) -> Timings:
    """Time the steps of each form. `tick` is called after each step. Peak memory is recorded on CUDA devices.

    Raises TimeIsUpError if the run's time ends before there are enough rounds.
    """
    timings = Timings({form: [] for form in steps})
    started, enough = time.perf_counter(), min(MIN_ROUNDS, limits.rounds)
    for number in range(limits.rounds):
        now = time.perf_counter()
        if number >= enough and (now >= limits.end or now >= started + limits.seconds):
            break
        for form in _turned(list(steps), number):
            if number < enough:
                limits.check()
            _time_step(form, steps[form], device, timings)
            tick()
    return timings


def _turned(forms: list[str], number: int) -> Iterator[str]:
    """Rotate and reverse the order, so that each form follows and precedes every other one equally often."""
    start = number // 2 % len(forms)
    turned = forms[start:] + forms[:start]
    return iter(turned if number % 2 == 0 else turned[::-1])


def _time_step(form: str, step: Step, device: torch.device, timings: Timings) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = clock(device)
    output = step()
    timings.seconds[form].append(clock(device) - started)
    timings.outputs[form] = output
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        timings.peak_bytes[form] = max(peak, timings.peak_bytes.get(form, 0))


def clock(device: torch.device) -> float:
    """Return the time in seconds when the device has finished its work.

    On a CPU with one thread it is the CPU's time, which other processes disturb less.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def alternate(base: Step, other: Step, seconds: float, device: torch.device) -> tuple[list[float], float]:
    """Time two steps against each other, after a warm-up.

    Returns:
        The ratio of the other's time to the base's in each round, and the base's median time in seconds.
    """
    steps, limits = {"base": base, "other": other}, Limits(sys.maxsize, seconds, math.inf)
    warm_up(steps, limits, lambda: None)
    timings = run_rounds(steps, device, limits, lambda: None)
    return timings.ratios("other", "base"), float(np.median(timings.seconds["base"]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 25th percentile, the median and the 75th percentile."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return low, median, high


def find_device(name: str | None, command: str) -> torch.device:
    """Return the device of this name; for None the accelerator, or the CPU if there is none.

    Args:
        name: Name of the device.
        command: Command that asks.

    Raises:
        ConfigError: If the device is not available.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        reason = "PyTorch knows no such type" if line.startswith("Expected one of") else line
        raise ConfigError(f"{command}: device `{name}` is not available: {reason}") from error


@contextlib.contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Run on this number of CPU threads within the context; None for PyTorch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
