"""Comparison of the requested launch with the one that runs: accelerate silently downgrades what it cannot do.

On a CPU, an FSDP configuration runs plain data parallelism, `--cpu --num_processes 2` runs one process, and DeepSpeed
without `use_cpu` runs a separate training in each process. All of them train, and none as requested.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
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
                f"strategy `{strategy}`). accelerate changes a launch silently. On a CPU it has no FSDP, and it starts "
                "several processes only for DeepSpeed; for plain data parallelism use torchrun. DeepSpeed on a CPU "
                "needs `use_cpu: true` in the train section, and ACCELERATE_USE_CPU unset"
            )


def check_one_gpu(arguments: TrainingArguments) -> None:
    """Refuse several GPUs in one process, where Trainer uses DataParallel, with a batch on each of them.

    Raises:
        ConfigError: If this process sees several GPUs, and no launcher gave it one.
    """
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"launch: this one process sees {arguments.n_gpu} GPUs, and Trainer would use them by DataParallel: start "
            f"a process for each with `accelerate launch --multi_gpu --num_processes {arguments.n_gpu} -m "
            "symphony_hf.train RECIPE`, or show it one with CUDA_VISIBLE_DEVICES=0"
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

    It spells out the part of accelerate's configuration that is in the environment: processes and machines, the
    precision, and what is set of DeepSpeed or FSDP. On another machine of several, `--machine_rank` is another.
    """
    processes = os.environ.get("WORLD_SIZE")
    local = os.environ.get("LOCAL_WORLD_SIZE", processes)
    machines = int(processes) // int(local) if processes and local else 1
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        if processes is None or local is None:
            return ["python"]
        return ["torchrun", "--nproc_per_node", local, *(["--nnodes", str(machines)] if machines > 1 else [])]
    words = ["accelerate", "launch", "--num_processes", processes or "1", "--mixed_precision", precision]
    if machines > 1:
        words += ["--num_machines", str(machines), *_options(_MACHINES)]
    if _is_on("ACCELERATE_USE_CPU"):
        words.append("--cpu")
    words += [word.lower() for word in _options(_COMPILER)]  # it is in capitals there
    if _is_on("ACCELERATE_USE_FSDP"):
        words += ["--use_fsdp", *_options(_FSDP)]
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        words += ["--use_deepspeed", *_options(_DEEPSPEED)]
        if machines > 1 and "TORCHELASTIC_RUN_ID" in os.environ:  # otherwise accelerate starts pdsh
            words += ["--deepspeed_multinode_launcher", "standard"]
    return words


_MACHINES = {"GROUP_RANK": "machine_rank", "MASTER_ADDR": "main_process_ip", "MASTER_PORT": "main_process_port"}
_COMPILER = {"ACCELERATE_DYNAMO_BACKEND": "dynamo_backend"}
_DEEPSPEED = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero3_save_16bit_model",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_moe_layer_cls_names",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
_FSDP = {
    f"FSDP_{name}": f"fsdp_{name.lower()}"
    for name in (
        *("VERSION", "SHARDING_STRATEGY", "RESHARD_AFTER_FORWARD", "OFFLOAD_PARAMS", "MIN_NUM_PARAMS"),
        *("AUTO_WRAP_POLICY", "BACKWARD_PREFETCH", "STATE_DICT_TYPE", "FORWARD_PREFETCH", "USE_ORIG_PARAMS"),
        *("CPU_RAM_EFFICIENT_LOADING", "SYNC_MODULE_STATES", "ACTIVATION_CHECKPOINTING"),
        "ACTIVATION_CHECKPOINTING_OFFLOAD",
    )
} | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap"}
"""Variables that accelerate's launcher sets -> its options, of which the older releases lack some."""


def _options(names: Mapping[str, str]) -> list[str]:
    """Return the options whose variables are set."""
    values = {option: os.environ.get(variable) for variable, option in names.items()}
    return [
        word
        for option, value in values.items()
        if value is not None and value.lower() not in ("none", "no", "auto")  # what they are by default
        for word in (f"--{option}", value)
    ]


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
