"""load_adapter: load an adapter with graphs onto a base model, which is symphonized first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from symphony_hf.checkpoints.graph_files import read_graphs
from symphony_hf.conversion.inspection.parts import Routing
from symphony_hf.conversion.inspection.tensors import bare_name, base_of
from symphony_hf.errors import ConfigError, GraphError, PatchError
from symphony_hf.files import ADAPTER_CONFIG, ADAPTER_RECORD, ADAPTER_WEIGHTS
from symphony_hf.patching.expert_graph import is_adapted
from symphony_hf.patching.families.named_gates import routers_of
from symphony_hf.patching.symphonize import is_symphonized, symphonize, unsymphonize
from symphony_hf.routing.graph import adjacency_problems

from .base_weights import check_base, sample_weights
from .placement import check_not_sharded, check_own, check_targets
from .record import NEEDS, AdapterRecord, check_same_mode, keep_record
from .targets import family_of
from .untrusted import adapter_tensors, add_adapter, check_tensors, read_peft_config, refusals, try_config


def load_adapter(
    model: nn.Module,
    adapter: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    revision: str | None = None,
) -> Any:
    """Load an adapter that was trained on a Symphony model. A plain base model is symphonized as the adapter requires.

    The record, PEFT's config, the graphs, the names and shapes of all tensors, and the base model are checked first; an
    adapter that is refused leaves the model unchanged. Only JSON and safetensors are read.

    Args:
        model: Base model, plain or symphonized, or the result of an earlier call, to add another adapter.
        adapter: Folder, or repository on the Hub.
        name: Name of the adapter in the model, for `set_adapter(name)`.
        trainable: Whether its parameters get gradients. The first adapter also puts the model into training mode or
            evaluation mode; a further one leaves every module in its mode.
        revision: Branch, tag or commit on the Hub.

    Returns:
        PEFT's `PeftModel`. The first adapter is active; others become active with `set_adapter`.

    Raises:
        ConfigError: If the adapter's record or PEFT's config is missing or invalid, the adapter belongs to another base
            model or other settings, or its tensors do not match.
        GraphError: If a graph is missing or invalid.
        PatchError: If the model already has an adapter of that name, or is sharded or offloaded.
    """
    check_not_sharded(model)
    folder = _local_folder(str(adapter), revision)
    record = AdapterRecord.read(folder)
    _check_graphs(folder / ADAPTER_WEIGHTS, record)
    if name in getattr(model, "peft_config", {}):
        raise PatchError(f"load_adapter: the model has an adapter `{name}` already: give another name=")
    config = keep_record(read_peft_config(folder), record)
    config.__dict__[NEEDS] = None  # the graphs are brought here
    config.inference_mode = not trainable
    weights = folder / ADAPTER_WEIGHTS
    modes = {module: module.training for module in model.modules()} if is_adapted(model) else {}

    def check() -> None:
        try_config(model, config, weights, name)
        with safe_open(weights, "pt") as file:
            check_targets(model, file.keys())

    prepare_base(model, record, str(folder / ADAPTER_RECORD), check)
    # On a 16-bit model PEFT's adapters are float32 unless it was trained otherwise, as TRL does on 4-bit models.
    with refusals(f"{folder / ADAPTER_CONFIG}"):
        adapted = add_adapter(model, config, name, widens=_is_wide(weights, config.peft_type))
    config.__dict__[NEEDS] = record  # of other models that the config is used for
    _copy_tensors(adapted, folder, name)
    if trainable:
        adapted.set_requires_grad(name)
    if not modes:
        return adapted.train(trainable)
    adapted.training = model.training  # where it is PEFT's first wrapper around transformers' own adapters
    _keep_modes(adapted, modes)
    return adapted


def restore_adapter(model: Any, folder: str | Path, name: str = "default") -> None:
    """Copy saved tensors into an adapter of a PEFT model, as the exact inverse of how PEFT saves them.

    PEFT's own loader also renames tensors for older checkpoints, which for some families (DeepSeek-OCR 2, Inkling 2,
    ...) silently drops LoRA tensors of current checkpoints.

    Raises:
        ConfigError: If the tensors do not match the adapter, or its record does not match the model. The model is
            unchanged then.
        PatchError: If the model is sharded or offloaded.
    """
    check_not_sharded(model)
    folder, base = Path(folder), base_of(model)
    if (folder / ADAPTER_RECORD).exists():
        record, where = AdapterRecord.read(folder), str(folder / ADAPTER_RECORD)
        _check_ready(base, record, where, "symphonize the model with the adapter's settings, or start without it")
        check_base(record.base_weights, sample_weights(base, list(record.routers)), where)
    _copy_tensors(model, folder, name)


def _copy_tensors(model: Any, folder: Path, name: str) -> None:
    saved = load_file(folder / ADAPTER_WEIGHTS)
    own = adapter_tensors(model, name, saved)
    shapes = ({key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in (own, saved))
    check_tensors(folder, model, *shapes)
    check_own(own, model)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])


def _keep_modes(model: nn.Module, modes: dict[nn.Module, bool]) -> None:
    """Put modules back into training or evaluation mode, and new ones into the mode of the module that they are in."""
    for module in model.modules():
        for child in module.children():
            child.training = modes.get(child, module.training)


def _local_folder(adapter: str, revision: str | None) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    names = (ADAPTER_RECORD, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    try:
        files = [huggingface_hub.hf_hub_download(adapter, name, revision=revision) for name in names]
    except EntryNotFoundError as error:
        raise ConfigError(f"load_adapter: `{adapter}` on the Hub lacks one of {', '.join(names)}: {error}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"load_adapter: `{adapter}` is not a folder, and could not be loaded from the Hub: {error}"
        ) from error
    return Path(files[0]).parent


def _check_graphs(weights: Path, record: AdapterRecord) -> None:
    if not weights.exists():
        raise ConfigError(f"`{weights}` does not exist: adapters are loaded from nothing but safetensors")
    stored = {bare_name(name): graph for name, graph in read_graphs(weights).items()}
    problems = [f"{name}: missing" for name in record.routers if name not in stored]
    for name, shape in record.routers.items():
        if name in stored:
            problems += [f"{name}: {problem}" for problem in adjacency_problems(stored[name], shape.num_experts)]
    problems += _updates_problems(weights)
    if problems:
        raise GraphError(f"`{weights}`: its graphs are not usable: {' | '.join(problems)}")


def _updates_problems(weights: Path) -> list[str]:
    """Check the update counters, which the warm-up of the strength depends on."""
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if name.endswith(".symphony.updates")]  # noqa: SIM118
        stored = {name: file.get_tensor(name) for name in names}
    return [
        f"{bare_name(name)}: expected a whole number of at least 0"
        for name, updates in stored.items()
        if updates.dtype != torch.int64 or updates.ndim or updates < 0
    ]


def _is_wide(weights: Path, peft_type: Any) -> bool:
    """Return whether what the adapter adds was saved in float32. Graphs always are, and whole modules have any type."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    added = f".{PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]}"
    with safe_open(weights, "pt") as file:
        return any(file.get_slice(name).get_dtype() == "F32" for name in file.keys() if added in name)  # noqa: SIM118


def prepare_base(model: nn.Module, record: AdapterRecord, where: str, check: Callable[[], None] = lambda: None) -> None:
    """Symphonize a plain base model for an adapter, or check a symphonized one.

    Args:
        model: Base model, plain or symphonized, with or without other adapters. Unchanged if it is refused.
        record: Record of the adapter.
        where: Place of the record, for error messages.
        check: Further check of the model, once it is symphonized.

    Raises:
        ConfigError: If the adapter is for another base model, for other settings, or cannot be beside the others.
    """
    check_same_mode(model, record.router, f"`{where}`")
    made_ready = _make_ready(model, record, where)
    try:
        check()
        check_base(record.base_weights, sample_weights(base_of(model), list(record.routers)), where)
    except BaseException:
        if made_ready:
            unsymphonize(base_of(model))
        raise


def _make_ready(model: nn.Module, record: AdapterRecord, where: str) -> bool:
    """Return whether the base model was plain."""
    base = base_of(model)
    if record.model_type != getattr(getattr(base, "config", None), "model_type", None):
        raise ConfigError(f"`{where}`: the adapter is for a model of type {record.model_type}, not {family_of(base)}")
    if is_symphonized(base):
        _check_ready(base, record, where, "load it onto the plain base model, which is symphonized as it needs")
        return False
    found = {router.name: Routing.of(router.contract) for router in routers_of(base, record.settings)}
    _check_routers(record.routers, found, where)
    symphonize(base, record.settings)
    return True


def _check_ready(base: nn.Module, record: AdapterRecord, where: str, advice: str) -> None:
    own = AdapterRecord.of(base, record.router)
    wanted, stored = record.settings.to_dict(), own.settings.to_dict()
    differing = [f"{key} {stored[key]!r}, not {value!r}" for key, value in wanted.items() if stored[key] != value]
    if differing:
        raise ConfigError(
            f"`{where}`: the model is symphonized with other settings than the adapter needs: {', '.join(differing)}: "
            f"{advice}"
        )
    _check_routers(record.routers, own.routers, where)


def _check_routers(wanted: dict[str, Routing], found: dict[str, Routing], where: str) -> None:
    if found != wanted:
        raise ConfigError(f"`{where}`: the adapter is for {_describe(wanted)}; the model has {_describe(found)}")


def _describe(routers: dict[str, Routing]) -> str:
    kinds = sorted({f"top-{shape.top_k} of {shape.num_experts}" for shape in routers.values()})
    names = list(routers)
    return f"{len(names)} routers, {names[0]} to {names[-1]}, {' and '.join(kinds)} experts"
