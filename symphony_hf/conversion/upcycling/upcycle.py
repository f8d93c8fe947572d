"""upcycle: turn a dense checkpoint on disk into a MoE checkpoint on disk."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from symphony_hf.errors import SymphonyWarning
from symphony_hf.patching.engines import engine_warnings

from .checkpoint import TORCH_DTYPES, Checkpoint
from .config import container_config, notes_on
from .exactness import Exactness, Upcycled, check_exactness
from .families import Conversion, find_conversion
from .options import UpcycleOptions
from .plan import PlannedTensor, expert_rows, plan_tensors
from .source import (
    CONFIG,
    DenseModel,
    carried_bytes,
    carry_files,
    find_folder,
    keep_tokenizer_class,
    open_dense,
    read_config,
    write_config,
)
from .target import check_apart, check_room, check_target, writing
from .writing import Contents, Shards

_SMALL_FILES = 2**20
"""Bytes reserved for the configs."""


@dataclass(frozen=True)
class UpcycleResult:
    """Result of an upcycling.

    Attributes:
        target: Folder of the new checkpoint.
        model_type: Model type of the container.
        layers: Layers whose MLPs became experts.
        parameters: Number of parameters of the new model.
        weight_bytes: Bytes of its tensors.
        files: Number of weights files.
        seconds_writing: Seconds from the first byte to the last flush, without the check.
        seconds_checking: Seconds of the check.
        exactness: Result of the check; None if there was none.
        notes: Notes for the user.
    """

    target: Path
    model_type: str
    layers: tuple[int, ...]
    parameters: int
    weight_bytes: int
    files: int
    seconds_writing: float
    seconds_checking: float
    exactness: Exactness | None
    notes: tuple[str, ...]


def upcycle(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    num_experts: int = 8,
    top_k: int = 2,
    layers: str | Sequence[int] = "all",
    router_std: float = 0.02,
    router_init: str = "normal",
    seed: int = 0,
    noise: float = 0.0,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    check: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
) -> UpcycleResult:
    """Turn a dense checkpoint into a MoE checkpoint whose experts are copies of the MLPs and whose routers are new.

    The result is a plain checkpoint of a MoE family of transformers, which stock tools load. The weights of the
    selected experts sum to 1, so the new model initially computes what the dense model computes. Tensors are streamed
    from file to file in blocks, so memory does not grow with the model. The target appears only once it is complete.

    Args:
        source: Dense checkpoint: a folder with safetensors files, or a name on the Hub.
        target: Folder to write.
        to: Target MoE family. Llama, Mistral, Phi-3 and Phi-3.5 become mixtral (default for all layers) or qwen2_moe
            (default for some), Qwen2 qwen2_moe, Qwen3 qwen3_moe, Granite granitemoe.
        num_experts: Number of copies of each MLP.
        top_k: Number of experts that process a token.
        layers: Layers whose MLPs become experts: `all`, `every-other` (1, 3, 5, ...), or layer numbers from 0.
            Every layer of mixtral and granitemoe has experts.
        router_std: Standard deviation of the routers' weights.
        router_init: Distribution of the routers' weights: normal or uniform.
        seed: Random seed. The same seed gives the same bytes.
        noise: Standard deviation of normal noise on each expert's weights, relative to the root mean square of each
            projection. Above 0 the model no longer computes exactly what the dense one does, and is not checked.
        dtype: Data type to cast all weights to: float32, bfloat16 or float16. By default each tensor keeps its own.
        max_shard_size: Maximum size of one weights file, in bytes or as in 5GB.
        check: Whether to compare the logits of both checkpoints, run layer by layer in float32 on 64 random tokens.
        overwrite: Whether a model in the target may be replaced; it stays until the new one is complete.
        revision: Branch, tag or commit of the source on the Hub.

    Returns:
        Sizes and times, and the result of the check.

    Raises:
        ConfigError: If an option is out of range.
        UpcycleError: If no container computes what this dense model does, or the check finds a difference.
        CheckpointError: If the source is incomplete, or the target cannot be written.

    Source:
        Sparse upcycling (arXiv 2212.05055).

    Deviation:
        The paper also draws routers from a normal distribution of deviation 0.02, but uses expert choice in the encoder
        and by default does not normalize the weights of the selected experts. Here they always sum to 1.
    """
    options = UpcycleOptions(
        num_experts=num_experts,
        top_k=top_k,
        layers=layers,
        router_std=router_std,
        router_init=router_init,
        seed=seed,
        noise=noise,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    target = Path(target).expanduser().absolute()
    check_target(target, overwrite)
    described = find_folder(source, revision, CONFIG)
    check_apart(described, target)
    settings = _settings(described, to, options)  # before gigabytes are downloaded
    folder = find_folder(source, described.name)  # the commit of that config
    plan = _plan(folder, settings, options)
    check_room(target, plan.shards.disk_bytes + carried_bytes(folder) + _SMALL_FILES)
    return _write(plan, target, check)


@dataclass(frozen=True)
class _Settings:
    dense: PreTrainedConfig
    conversion: Conversion
    config: PreTrainedConfig
    layers: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    dense: DenseModel
    settings: _Settings
    tensors: list[PlannedTensor]
    shards: Shards
    options: UpcycleOptions


def _settings(folder: Path, to: str | None, options: UpcycleOptions) -> _Settings:
    """Check everything that depends on the source's config."""
    dense = read_config(folder)
    layers = options.layer_numbers(dense.num_hidden_layers)
    conversion = find_conversion(dense.model_type, to, len(layers) == dense.num_hidden_layers)
    config = container_config(dense, conversion, layers, options)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return _Settings(dense, conversion, config, layers)


def _plan(folder: Path, settings: _Settings, options: UpcycleOptions) -> _Plan:
    """Check everything that depends on the source's tensors, without writing."""
    dense = open_dense(folder, settings.dense)
    tensors = plan_tensors(dense.tensors, settings.dense, settings.conversion, settings.layers, options)
    shards = Shards(tensors, options.max_shard_size)
    kept = settings.dense.dtype if options.dtype is None else None
    settings.config.dtype = kept or TORCH_DTYPES[shards.main_dtype]
    return _Plan(dense, settings, tensors, shards, options)


def _write(plan: _Plan, target: Path, check: bool) -> UpcycleResult:
    notes = notes_on(plan.settings.config, plan.settings.conversion) + engine_warnings(plan.settings.config)
    started, exactness, seconds_checking = time.perf_counter(), None, 0.0
    with writing(target) as folder:
        carry_files(plan.dense.checkpoint.folder, folder)
        write_config(plan.settings.config, folder)
        notes += keep_tokenizer_class(plan.dense.checkpoint.folder, folder)
        plan.shards.write(folder, Contents(plan.dense.checkpoint, plan.options))
        if plan.options.noise > 0:
            notes.append("the experts have noise, so the model does not compute exactly what the dense one does")
        elif check:
            began = time.perf_counter()
            exactness = _check(plan, folder)
            seconds_checking = time.perf_counter() - began
    for note in notes:
        warnings.warn(f"upcycle: {note}", SymphonyWarning, stacklevel=3)
    return UpcycleResult(
        target=target,
        model_type=plan.settings.config.model_type,
        layers=plan.settings.layers,
        parameters=plan.shards.parameters,
        weight_bytes=plan.shards.weight_bytes,
        files=len(plan.shards.split.filename_to_tensors),
        seconds_writing=time.perf_counter() - started - seconds_checking,
        seconds_checking=seconds_checking,
        exactness=exactness,
        notes=tuple(notes),
    )


def _check(plan: _Plan, folder: Path) -> Exactness:
    upcycled = Upcycled(
        checkpoint=Checkpoint(folder),
        config=CONFIG_MAPPING[plan.settings.config.model_type].from_pretrained(folder),
        container=plan.settings.conversion.container,
        experts=expert_rows(plan.tensors),
        num_experts=plan.options.num_experts,
    )
    return check_exactness(plan.dense, upcycled, plan.options.stored_dtype)


def print_result(result: UpcycleResult, console: Console | None = None) -> None:
    """Print the result of an upcycling."""
    console = console or Console()
    size = result.weight_bytes / 1e9
    speed = size / result.seconds_writing
    lines = [
        f"{result.model_type}, {result.parameters:,} parameters, experts in {len(result.layers)} layers",
        f"{size:.2f} GB in {result.files} files, {result.seconds_writing:.1f} seconds ({speed:.2f} GB/s)",
    ]
    if result.exactness is None:
        lines.append("not checked against the dense model")
    else:
        seen = result.exactness
        lines.append(
            f"checked on {seen.tokens} tokens: logits differ from the dense model's by {seen.difference:.2g} at most, "
            f"of {seen.largest:.3g} ({result.seconds_checking:.1f} seconds)"
        )
    for line in [*lines, *result.notes, f"Written to {result.target}"]:
        console.print(line, highlight=False, soft_wrap=True)
