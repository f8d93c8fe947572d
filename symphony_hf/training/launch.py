"""Comparison of the requested launch with the one that runs: accelerate silently downgrades what it cannot do.

On a CPU, an FSDP configuration runs plain data parallelism, `--cpu --num_processes 2` runs one process, and DeepSpeed
without `use_cpu` runs a separate training in each process. All of them train, and none as requested.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import TrainingArguments

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import LaunchSection


class Request(NamedTuple):
    """One requested property of the launch, and who requested it."""

    who: str
    what: str  # processes or strategy
    wanted: Any


def check_launch(requested: Sequence[Request], processes: int, strategy: str) -> None:
    """Compare the requested launch with the one that runs, or is about to. Raises ConfigError if they differ.

    `strategy` is that of `expected_strategy` or `strategy_of`.
    """
    running = {"processes": processes, "strategy": strategy}
    for who, what, wanted in requested:
        found = running[what]
        any_stage = wanted == "zero" and strategy.startswith("zero")
        if found != wanted and not any_stage:
            raise ConfigError(
                f"launch: {who} asks for {what} `{wanted}`, but what runs is `{found}` ({processes} processes, "
                f"strategy `{strategy}`). accelerate downgrades silently: on a CPU it has no FSDP, and starts "
                "several processes only for DeepSpeed (use torchrun), which needs `use_cpu: true` in the train "
                "section and no ACCELERATE_USE_CPU"
            )


def requests_of(section: LaunchSection, arguments: TrainingArguments) -> list[Request]:
    """Return the requests of the recipe, its train section and the launcher of this process."""
    return [*_requests_of_recipe(section), *_requests_of_arguments(arguments), *_requests_of_launcher()]


def expected_strategy(arguments: TrainingArguments) -> str:
    """Return the strategy that accelerate will use, as far as it is known before a Trainer is created."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and not _is_on("ACCELERATE_USE_CPU"):
        return f"zero{plugin.zero_stage}"
    if (arguments.fsdp or _is_on("ACCELERATE_USE_FSDP")) and arguments.device.type != "cpu":
        return "fsdp"
    return "single" if arguments.world_size == 1 else "ddp"


def strategy_of(state: Any) -> str:
    """Return the strategy of accelerate's AcceleratorState: `single`, `ddp`, `fsdp`, or `zero0` to `zero3`."""
    from accelerate import DistributedType

    if state.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{state.deepspeed_plugin.zero_stage}"
    if state.distributed_type == DistributedType.FSDP:
        return "fsdp"
    return "single" if state.num_processes == 1 else "ddp"


def check_launch_of_trainer(arguments: TrainingArguments) -> None:
    """Compare the launch of a user's own Trainer with what its arguments and the launcher request.

    Raises:
        ConfigError: If they differ.
    """
    from accelerate.state import AcceleratorState

    state = AcceleratorState()
    check_launch(
        [*_requests_of_arguments(arguments), *_requests_of_launcher()], state.num_processes, strategy_of(state)
    )


def launch_command() -> list[str]:
    """Return the command line, up to `-m`, that launches the same processes again.

    It spells out the part of accelerate's configuration that is in the environment: the number of processes, the
    precision, and DeepSpeed's stage and offloading.
    """
    processes = os.environ.get("WORLD_SIZE")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        if processes is None:
            return ["python"]
        local = os.environ.get("LOCAL_WORLD_SIZE", processes)
        machines = ["--nnodes", str(int(processes) // int(local))] if local != processes else []
        return ["torchrun", "--nproc_per_node", local, *machines]
    words = ["accelerate", "launch", "--num_processes", processes or "1", "--mixed_precision", precision]
    if _is_on("ACCELERATE_USE_CPU"):
        words.append("--cpu")
    if _is_on("ACCELERATE_USE_FSDP"):
        words.append("--use_fsdp")
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        words.append("--use_deepspeed")
        for name in ("config_file", "zero_stage", "offload_optimizer_device", "offload_param_device"):
            value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}")
            if value not in (None, "none"):
                words += [f"--{'deepspeed_' if name == 'config_file' else ''}{name}", str(value)]
    return words


def _requests_of_recipe(section: LaunchSection) -> Iterator[Request]:
    for what in ("processes", "strategy"):
        if getattr(section, what) is not None:
            yield Request("the recipe", what, getattr(section, what))


def _requests_of_arguments(arguments: TrainingArguments) -> Iterator[Request]:
    if arguments.deepspeed:
        yield Request("the train section", "strategy", "zero")
    if arguments.fsdp:
        yield Request("the train section", "strategy", "fsdp")


def _requests_of_launcher() -> Iterator[Request]:
    if "WORLD_SIZE" in os.environ:
        yield Request("the launcher", "processes", int(os.environ["WORLD_SIZE"]))
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        # With a DeepSpeed config file, the stage is in that file.
        in_file = "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ
        stage = "" if in_file else os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        yield Request("the launcher", "strategy", f"zero{stage}")
    if _is_on("ACCELERATE_USE_FSDP"):
        yield Request("the launcher", "strategy", "fsdp")


def is_launched() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process."""
    return any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"))


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
