"""accelerate's configurations as what a plan needs of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import Strategy

_HALVES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """One configuration of accelerate.

    Attributes:
        name: Of its file.
        strategy: How training is spread: `single`, `ddp`, `zero1`, `zero2` or `zero3`.
        on_gpu: Whether it trains on GPUs; on the CPU otherwise.
        machines: How many.
        half: The type of mixed precision where the recipe says none; None without it.
        optimizer_on_host: Whether gradients and the optimizer are in the memory of the host.
        weights_on_host: Whether weights are.
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
    """Read a configuration of accelerate, or all of a folder.

    Raises:
        ConfigError: If there is none, one cannot be read, or it is of a kind that is not planned.
    """
    path = Path(path)
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"plan: no configuration of accelerate in `{path}`: give another folder, or one's file")
    return sorted((_read(file) for file in files), key=_order)


def _order(launch: Launch) -> Any:
    """From what takes the most memory to what takes the least."""
    return not launch.on_gpu, launch.machines, not launch.is_single, launch.strategy, launch.optimizer_on_host


def _read(path: Path) -> Launch:
    where = f"plan: `{path}`"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is no YAML: {error}") from error
    if not isinstance(values, Mapping) or "distributed_type" not in values:
        raise ConfigError(f"{where} is no configuration of accelerate: it has no `distributed_type`")
    kind, deepspeed = str(values["distributed_type"]), values.get("deepspeed_config") or {}
    strategies: dict[str, Any] = {"NO": "single", "MULTI_GPU": "ddp", "DEEPSPEED": f"zero{deepspeed.get('zero_stage')}"}
    strategy = strategies.get(kind)
    if strategy not in ("single", "ddp", "zero1", "zero2", "zero3"):
        raise ConfigError(
            f"{where}: `{kind}` is not planned: NO, MULTI_GPU, and DEEPSPEED with a `zero_stage` of 1 to 3 are"
        )
    half = str(values.get("mixed_precision", "no"))
    if half not in _HALVES:
        raise ConfigError(f"{where}: mixed_precision `{half}` is not planned: no, bf16 and fp16 are")
    return Launch(
        name=path.stem,
        strategy=strategy,
        on_gpu=not values.get("use_cpu", False),
        machines=int(values.get("num_machines", 1)),
        half=_HALVES[half],
        optimizer_on_host=deepspeed.get("offload_optimizer_device", "none") != "none",
        weights_on_host=deepspeed.get("offload_param_device", "none") != "none",
    )
