"""Launches to plan for, read from accelerate's configurations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import Strategy
from symphony_hf.settings import read_yaml

_HALVES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """One configuration of accelerate.

    Attributes:
        name: Name of its file, without the suffix.
        strategy: How training is distributed: `single`, `ddp`, `zero1`, `zero2` or `zero3`.
        on_gpu: Whether it trains on GPUs; otherwise it trains on the CPU.
        machines: Number of machines.
        half: Dtype of mixed precision if the recipe sets none; None for full precision.
        optimizer_on_host: Whether gradients and optimizer states are offloaded to host memory.
        weights_on_host: Whether weights are offloaded to host memory.
    """

    name: str
    strategy: Strategy
    on_gpu: bool = True
    machines: int = 1
    half: torch.dtype | None = None
    optimizer_on_host: bool = False
    weights_on_host: bool = False

    @property
    def is_single(self) -> bool:
        return self.strategy == "single"

    @property
    def uses_deepspeed(self) -> bool:
        return self.strategy.startswith("zero")


def read_launches(path: str | Path) -> list[Launch]:
    """Read one accelerate configuration, or all in a folder.

    Raises:
        ConfigError: If there is none, or one cannot be read or is of a kind that cannot be planned.
    """
    path = Path(path)
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"plan: no accelerate configuration in `{path}`: give another folder, or a file")
    return sorted((_read(file) for file in files), key=_order)


def _order(launch: Launch) -> Any:
    """Sort key, from the launch that needs the most memory per GPU to the one that needs the least."""
    return not launch.on_gpu, launch.machines, not launch.is_single, launch.strategy, launch.optimizer_on_host


def _read(path: Path) -> Launch:
    where = f"plan: `{path}`"
    values = read_yaml(path, where)
    if not isinstance(values, Mapping) or "distributed_type" not in values:
        raise ConfigError(f"{where} is not an accelerate configuration: it has no `distributed_type`")
    kind, deepspeed = str(values["distributed_type"]), values.get("deepspeed_config") or {}
    strategies: dict[str, Any] = {"NO": "single", "MULTI_GPU": "ddp", "DEEPSPEED": f"zero{deepspeed.get('zero_stage')}"}
    strategy = strategies.get(kind)
    if strategy not in ("single", "ddp", "zero1", "zero2", "zero3"):
        raise ConfigError(
            f"{where}: `{kind}` cannot be planned: expected NO, MULTI_GPU, or DEEPSPEED with a `zero_stage` of 1 to 3"
        )
    half = str(values.get("mixed_precision") or "no")  # YAML reads an unquoted `no` as False
    if half not in _HALVES:
        raise ConfigError(f"{where}: mixed_precision `{half}` cannot be planned: expected no, bf16 or fp16")
    return Launch(
        name=path.stem,
        strategy=strategy,
        on_gpu=not values.get("use_cpu", False),
        machines=int(values.get("num_machines", 1)),
        half=_HALVES[half],
        optimizer_on_host=deepspeed.get("offload_optimizer_device", "none") != "none",
        weights_on_host=deepspeed.get("offload_param_device", "none") != "none",
    )
