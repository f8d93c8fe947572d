"""Plans of recipes: memory, micro-batch size and hours under each launch, without weights, data or GPUs."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import Recipe
from symphony_hf.training.precision import is_saved_whole, narrow_weights

from .launches import Launch
from .memory import Memory, States, memory_of, states_of
from .optimizers import Optimizer, optimizer_of
from .settings import TrainSettings, read_settings, sequences_of_data, sequences_of_run
from .step import MetaStep, StepBytes, meta_model

USABLE = 0.95
"""Usable share of a GPU's memory. The rest is for CUDA, NCCL and fragmentation."""

MAX_MICRO_BATCH_SIZE = 1024
"""Largest micro-batch size that is tried."""


@dataclass(frozen=True)
class Machine:
    """The GPUs to plan for.

    Args:
        gpu_memory: Memory of one GPU, in bytes.
        gpu_flops: Peak FLOP/s of one GPU, in the recipe's compute dtype.
        utilization: Share of the peak that training reaches, with recomputation counted as work.
    """

    gpu_memory: int
    gpu_flops: float = 989.5e12
    utilization: float = 0.35

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "gpu_flops"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"plan: `{name}` must be above 0, got {getattr(self, name)}")
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"plan: `utilization` must be above 0 and at most 1, got {self.utilization}")


@dataclass(frozen=True)
class PlanRow:
    """A recipe under one launch.

    Attributes:
        launch: The launch.
        processes: Number of processes on all machines.
        memory: Memory at the recipe's own micro-batch size.
        max_micro_batch_size: Largest micro-batch size that fits on a GPU; 0 if none fits, None on the CPU.
        sequences: Number of sequences that the run trains on; None if the size of the data is unknown.
        hours: Duration of the run; None on the CPU, or if `sequences` is None.
    """

    launch: Launch
    processes: int
    memory: Memory
    max_micro_batch_size: int | None
    sequences: int | None
    hours: float | None


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe.

    Attributes:
        settings: The recipe's training settings.
        block_size: Number of tokens in a sequence.
        machine: GPUs that it was made for.
        states: Sizes of the model.
        flops_per_sequence: FLOPs of training on one sequence.
        rows: One row per launch and number of GPUs.
        left_out: Launches under which the recipe does not run, with the reason.
        rounding: Launches under which weights are trained in 16 bits, without a float32 copy.
    """

    settings: TrainSettings
    block_size: int
    machine: Machine
    states: States
    flops_per_sequence: int
    rows: tuple[PlanRow, ...]
    left_out: dict[str, str]
    rounding: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values for a JSON file, with sizes in bytes."""
        settings = dataclasses.asdict(self.settings) | {"half": _name(self.settings.half)}
        return {
            "settings": settings,
            "block_size": self.block_size,
            "machine": dataclasses.asdict(self.machine) | {"usable": USABLE},
            "parameters": self.states.total,
            "trained_parameters": self.states.num_trained,
            "flops_per_sequence": self.flops_per_sequence,
            "rows": [self._row(row) for row in self.rows],
            "left_out": self.left_out,
            "rounding": self.rounding,
        }

    def _row(self, row: PlanRow) -> dict[str, Any]:
        return {
            "launch": row.launch.name,
            "strategy": row.launch.strategy,
            "machines": row.launch.machines,
            "processes": row.processes,
            "gpu_bytes": {**row.memory.gpu, "total": row.memory.gpu_total},
            "host_bytes": {**row.memory.host, "loading": row.memory.loading, "total": row.memory.host_total},
            "most_sequences": row.max_micro_batch_size,
            "sequences": row.sequences,
            "tokens": None if row.sequences is None else row.sequences * self.block_size,
            "hours": row.hours,
        }


def plan_recipe(
    recipe: Recipe, launches: Sequence[Launch], gpus: Sequence[int], machine: Machine, sequences: int | None = None
) -> Plan:
    """Plan a recipe under each launch with each number of GPUs, without loading or creating weights.

    `gpus` are numbers of GPUs in one machine. `sequences` is the number of sequences in one epoch, if the recipe's data
    is not available locally.

    Raises:
        ConfigError: If a number is not above 0, a setting is unknown or cannot be planned, or the model's config could
            not be loaded.
        UnsupportedModelError: If the model's forward depends on the values of tensors.
    """
    for number in [*gpus, *([] if sequences is None else [sequences])]:
        if number < 1:
            raise ConfigError(f"plan: numbers of GPUs and sequences must be at least 1, got {number}")
    settings = read_settings(recipe)
    optimizer = optimizer_of(settings.optimizer)
    model = meta_model(recipe)
    states = states_of(model, recipe.model.quantization is not None)
    if not states.trained:
        raise ConfigError("model: nothing is trained: `trainable` freezes every parameter")
    counts = {launch.name: _counts(launch, gpus, recipe.launch.processes) for launch in launches}
    reasons = {launch.name: _why_not(recipe, launch, counts[launch.name]) for launch in launches}
    left_out = {name: why for name, why in reasons.items() if why is not None}
    launches = [launch for launch in launches if launch.name not in left_out]
    if not launches:
        raise ConfigError(
            f"plan: the recipe runs under none of the launches: {'; '.join(sorted(set(left_out.values())))}"
        )
    if settings.max_steps > 0 and sequences is not None:
        raise ConfigError(
            f"plan: with `max_steps: {settings.max_steps}`, `sequences` has no effect: leave out one of them"
        )
    if settings.max_steps <= 0 and sequences is None:
        sequences = sequences_of_data(recipe)
    with tqdm(desc="Counting", unit=" steps", disable=None) as bar:
        steps = _Steps(recipe, settings, bar)
        flops = steps.flops(launches[0])
        planner = _Planner(settings, states, optimizer, machine, steps, flops, sequences)
        rows = [planner.row(launch, count) for launch in launches for count in counts[launch.name]]
    rounding = tuple(launch.name for launch in launches if _rounds(model, launch, steps.half(launch)))
    return Plan(settings, recipe.data.block_size, machine, states, flops, tuple(rows), left_out, rounding)


def _rounds(model: nn.Module, launch: Launch, half: torch.dtype | None) -> bool:
    """Whether weights are trained in 16 bits, as `keep_steps_precise` warns of."""
    narrow = narrow_weights(model)
    return not launch.uses_deepspeed and any(half is None or not is_saved_whole(name) for name in narrow)


def _counts(launch: Launch, gpus: Sequence[int], processes: int | None) -> list[int]:
    """Return the numbers of processes to plan: those of the launch that the recipe allows."""
    counts = [1] if launch.is_single else [number * launch.machines for number in gpus]
    return [count for count in counts if processes in (None, count)]


def _why_not(recipe: Recipe, launch: Launch, counts: Sequence[int]) -> str | None:
    """Return why the runner would refuse a launch; None if it would not."""
    if recipe.model.quantization is not None and launch.strategy == "zero3":
        return "4-bit weights cannot be partitioned over processes"
    if recipe.launch.strategy not in (None, launch.strategy):
        return f"the recipe's `launch` section asks for {recipe.launch.strategy}"
    if not counts:
        return f"the recipe's `launch` section asks for {recipe.launch.processes} processes"
    return None


class _Steps:
    """Steps of a recipe by precision and micro-batch size, each measured once."""

    def __init__(self, recipe: Recipe, settings: TrainSettings, bar: Any) -> None:
        self._recipe, self._settings, self._bar = recipe, settings, bar
        self._built: dict[Any, MetaStep] = {}
        self._counted: dict[Any, StepBytes] = {}

    def half(self, launch: Launch) -> torch.dtype | None:
        """Return the dtype of mixed precision; the recipe's takes precedence over the launcher's."""
        return self._settings.half or launch.half

    def flops(self, launch: Launch) -> int:
        self._bar.update()
        return self._step(launch)[1].flops()

    def bytes(self, launch: Launch, micro_batch: int) -> StepBytes:
        key, step = self._step(launch)
        if (key, micro_batch) not in self._counted:
            self._counted[key, micro_batch] = step.bytes(micro_batch)
            self._bar.update()
        return self._counted[key, micro_batch]

    def _step(self, launch: Launch) -> tuple[Any, MetaStep]:
        half = self.half(launch)
        key = half, launch.uses_deepspeed and half is not None
        if key not in self._built:
            self._built[key] = MetaStep(self._recipe, self._settings, *key)
        return key, self._built[key]


@dataclass(frozen=True)
class _Planner:
    settings: TrainSettings
    states: States
    optimizer: Optimizer
    machine: Machine
    steps: _Steps
    flops: int
    sequences: int | None

    def row(self, launch: Launch, processes: int) -> PlanRow:
        def memory(step: StepBytes) -> Memory:
            accumulates = self.settings.accumulation > 1
            half = self.steps.half(launch)
            return memory_of(launch, processes, self.states, step, self.optimizer, half, accumulates)

        sequences = sequences_of_run(self.settings, processes, self.sequences)
        most = hours = None
        if launch.on_gpu:
            limit = USABLE * self.machine.gpu_memory
            most = find_max_micro_batch_size(
                lambda count: self.steps.bytes(launch, count), lambda step: memory(step).gpu_total <= limit
            )
        if launch.on_gpu and sequences is not None:
            speed = processes * self.machine.gpu_flops * self.machine.utilization
            hours = sequences * self.flops / speed / 3600
        own = memory(self.steps.bytes(launch, self.settings.micro_batch))
        return PlanRow(launch, processes, own, most, sequences, hours)


def find_max_micro_batch_size(count: Callable[[int], StepBytes], fits: Callable[[StepBytes], bool]) -> int:
    """Return the largest micro-batch size that fits, up to MAX_MICRO_BATCH_SIZE; 0 if not even one sequence fits.

    `count` returns the bytes of a step by its micro-batch size. Steps are measured at powers of two and interpolated
    linearly in between. Interpolation never underestimates, since the peak is a maximum of functions that grow
    linearly, and therefore convex.
    """
    if not fits(count(1)):
        return 0
    lower = 1
    while lower < MAX_MICRO_BATCH_SIZE and fits(count(2 * lower)):
        lower *= 2
    if lower >= MAX_MICRO_BATCH_SIZE:
        return MAX_MICRO_BATCH_SIZE
    below, above = count(lower), count(2 * lower)
    return max(lower + more for more in range(lower) if fits(_between(below, above, more / lower)))


def _between(below: StepBytes, above: StepBytes, share: float) -> StepBytes:
    return StepBytes(
        *(
            round(low + share * (high - low))
            for low, high in zip(dataclasses.astuple(below), dataclasses.astuple(above), strict=True)
        )
    )


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def accelerate_folder(recipe: str | Path) -> Path:
    """Return the folder of launches next to a recipe's own: `recipes/accelerate` for `recipes/NAME/config.yaml`."""
    return Path(recipe).absolute().parent.parent / "accelerate"
