"""Steps timed in alternation: in each round every form once, the order turned from round to round."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_ROUNDS = 5
"""Fewer ratios than these have no quartiles to speak of."""

WARM_UP = 3
"""Steps of each form that are not timed: kernels are chosen, memory is taken, optimizers make their state."""

Step = Callable[[], Tensor]


class TimeIsUpError(Exception):
    """The time for the whole run ended before a case had enough rounds."""


@dataclass
class Timings:
    """What the rounds gave, by form.

    Attributes:
        seconds: Of each step, in the order of the rounds.
        peak_bytes: The most memory that a step held; none on a CPU.
        outputs: Of the last steps.
    """

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def ratios(self, form: str, base: str) -> list[float]:
        """One form's time over another's in the same round."""
        return [mine / other for mine, other in zip(self.seconds[form], self.seconds[base], strict=True)]


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        rounds: At most.
        seconds: For these rounds; MIN_ROUNDS are run even if they take longer.
        end: `time.perf_counter()` at which the whole run stops.
    """

    rounds: int
    seconds: float
    end: float

    def check(self) -> None:
        """Raise TimeIsUpError when it is."""
        if time.perf_counter() >= self.end:
            raise TimeIsUpError("the time was up")


def warm_up(steps: dict[str, Step], limits: Limits, tick: Callable[[], object]) -> None:
    """Run each form a few times.

    Raises:
        TimeIsUpError: If the run's time ends meanwhile.
    """
    for _ in range(WARM_UP):
        for step in steps.values():
            limits.check()
            step()
            tick()


def run_rounds(steps: dict[str, Step], device: torch.device, limits: Limits, tick: Callable[[], object]) -> Timings:
    """Time the steps.

    Args:
        steps: By form. Each returns its loss.
        device: Whose work is waited for, and whose memory is looked at.
        limits: When to stop.
        tick: Called after each step.

    Raises:
        TimeIsUpError: If the run's time ends before there are enough rounds.
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
    """Each form comes at each place, before and after each other: what one leaves behind meets all."""
    place = number // 2 % len(forms)
    turned = forms[place:] + forms[:place]
    return iter(turned if number % 2 == 0 else turned[::-1])


def _time_step(form: str, step: Step, device: torch.device, timings: Timings) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    output = step()
    if on_gpu:
        torch.cuda.synchronize(device)
    timings.seconds[form].append(time.perf_counter() - started)
    timings.outputs[form] = output
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        timings.peak_bytes[form] = max(peak, timings.peak_bytes.get(form, 0))
