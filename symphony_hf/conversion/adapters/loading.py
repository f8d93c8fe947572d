"""load_adapter: an adapter with graphs, on a base model that is made ready for it first."""

from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from symphony_hf.checkpoints.folder import RECORD_NAME
from symphony_hf.checkpoints.graph_files import read_graphs
from symphony_hf.conversion.inspection.tensors import bare_name
from symphony_hf.errors import ConfigError, GraphError, PatchError
from symphony_hf.patching.families.named_gates import routers_of
from symphony_hf.patching.symphonize import is_symphonized, symphonize, unsymphonize
from symphony_hf.routing.graph import adjacency_problems

from .base_weights import check_base, sample_weights
from .record import AdapterRecord, RouterShape, keep_record
from .targets import base_of, family_of
from .untrusted import CONFIG_NAME, add_adapter, check_tensors, read_peft_config, refusals, try_config

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(
    model: nn.Module,
    adapter: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    revision: str | None = None,
) -> Any:
    """Load an adapter that was trained on a Symphony model. A plain base model is symphonized first, as it needs.

    The record, PEFT's config, the graphs, and the names and shapes of all tensors are checked first: what is refused
    leaves the model as it was. Nothing but JSON and safetensors is read.

    Args:
        model: The base model, plain or symphonized; or what this returned for another adapter, to add one.
        adapter: A folder, or a repository on the Hub.
        name: What to call the adapter; `set_adapter(name)` switches to it.
        trainable: Whether to go on training it.
        revision: Branch, tag or commit on the Hub.

    Returns:
        PEFT's `PeftModel`. The first adapter is active; a further one is after `set_adapter`.

    Raises:
        ConfigError: If the adapter's record or PEFT's config is missing or not usable, or of another model or other
            settings than this one's; or its tensors are not those that the two ask for.
        GraphError: If a graph is missing from the adapter, or is none.
        PatchError: If the model has an adapter of that name.
    """
    folder = _local_folder(str(adapter), revision)
    record = AdapterRecord.read(folder)
    _check_graphs(folder / _WEIGHTS, record)
    if name in getattr(model, "peft_config", {}):
        raise PatchError(f"load_adapter: the model has an adapter `{name}` already: give another name=")
    config = keep_record(read_peft_config(folder), record)
    config.inference_mode = not trainable
    made_ready = _make_ready(model, record, folder)
    try:
        try_config(model, config, folder / _WEIGHTS, name)
        check_base(record.base_weights, sample_weights(base_of(model), list(record.routers)), folder)
    except ConfigError:
        if made_ready:
            unsymphonize(base_of(model))
        raise
    # PEFT's LoRA is float32 on a model of 16 bits, unless it was trained otherwise, as TRL does on one of 4.
    with refusals(f"{folder / CONFIG_NAME}"):
        adapted = add_adapter(model, config, name, widens=_is_wide(folder / _WEIGHTS))
    restore_adapter(adapted, folder, name)
    if trainable:
        adapted.set_requires_grad(name)
    return adapted.train(trainable)


def restore_adapter(model: Any, folder: str | Path, name: str = "default") -> None:
    """Give an adapter that is in a model the numbers that were saved: the exact reverse of how PEFT saved them.

    PEFT's own loading also renames tensors as older checkpoints need it, which for some families (DeepSeek-OCR 2,
    Inkling 2, ...) leaves LoRA's tensors of today without a place, and says nothing.

    Args:
        model: PEFT's, with the adapter.
        folder: Where the adapter was saved.
        name: The adapter's in the model.

    Raises:
        ConfigError: If the tensors are not those that the adapter has, or its record asks for other graphs than the
            model's; nothing was changed then.
    """
    from peft import get_peft_model_state_dict

    if (Path(folder) / RECORD_NAME).exists():
        record = AdapterRecord.read(folder)
        _check_ready(base_of(model), record, Path(folder))
        check_base(record.base_weights, sample_weights(base_of(model), list(record.routers)), Path(folder))
    saved = load_file(Path(folder) / _WEIGHTS)
    # What PEFT would save now: the model's own tensors, under the names in the file.
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = ({key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in (own, saved))
    check_tensors(Path(folder), model, *shapes)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])


def _local_folder(adapter: str, revision: str | None) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    names = (RECORD_NAME, CONFIG_NAME, _WEIGHTS)
    try:
        files = [huggingface_hub.hf_hub_download(adapter, name, revision=revision) for name in names]
    except EntryNotFoundError as error:
        raise ConfigError(f"load_adapter: `{adapter}` on the Hub lacks one of {', '.join(names)}: {error}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"load_adapter: `{adapter}` is no folder, and not to be had from the Hub: {error}") from error
    return Path(files[0]).parent


def _check_graphs(weights: Path, record: AdapterRecord) -> None:
    if not weights.exists():
        raise ConfigError(f"`{weights}` does not exist, and adapters are loaded from nothing but safetensors")
    stored = {bare_name(name): graph for name, graph in read_graphs(weights).items()}
    problems = [f"{name}: missing" for name in record.routers if name not in stored]
    for name, shape in record.routers.items():
        if name in stored:
            problems += [f"{name}: {problem}" for problem in adjacency_problems(stored[name], shape.num_experts)]
    problems += _updates_problems(weights)
    if problems:
        raise GraphError(f"`{weights}`: its graphs are not usable: {' | '.join(problems)}")


def _updates_problems(weights: Path) -> list[str]:
    """By how many updates a strength warms up; a negative number, or none, would turn it around."""
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if name.endswith(".symphony.updates")]  # noqa: SIM118
        stored = {name: file.get_tensor(name) for name in names}
    return [
        f"{bare_name(name)}: a whole number from 0 on was expected"
        for name, updates in stored.items()
        if updates.dtype != torch.int64 or updates.ndim or updates < 0
    ]


def _is_wide(weights: Path) -> bool:
    """Whether LoRA was saved in float32."""
    with safe_open(weights, "pt") as file:
        return any(file.get_slice(name).get_dtype() == "F32" for name in file.keys() if ".lora_" in name)  # noqa: SIM118


def _make_ready(model: nn.Module, record: AdapterRecord, folder: Path) -> bool:
    """Symphonize a plain base model as the adapter's was, or see that a symphonized one is so; whether it was plain."""
    base = base_of(model)
    if record.model_type != getattr(getattr(base, "config", None), "model_type", None):
        raise ConfigError(f"load_adapter: `{folder}` is for a model of type {record.model_type}, not {family_of(base)}")
    if is_symphonized(base):
        _check_ready(base, record, folder)
        return False
    found = {router.name: RouterShape.of(router.contract) for router in routers_of(base, record.settings)}
    _check_routers(record.routers, found, folder)
    symphonize(base, record.settings)
    return True


def _check_ready(base: nn.Module, record: AdapterRecord, folder: Path) -> None:
    own = AdapterRecord.of(base, record.router)
    wanted, stored = record.settings.to_dict(), own.settings.to_dict()
    differing = [f"{key} {stored[key]!r}, not {value!r}" for key, value in wanted.items() if stored[key] != value]
    if differing:
        raise ConfigError(
            f"the model is symphonized with other settings than the adapter of `{folder}` needs: "
            f"{', '.join(differing)}. Give `load_adapter` the plain base, and it is symphonized as the adapter's was"
        )
    _check_routers(record.routers, own.routers, folder)


def _check_routers(wanted: dict[str, RouterShape], found: dict[str, RouterShape], folder: Path) -> None:
    if found != wanted:
        raise ConfigError(f"load_adapter: `{folder}` is for {_describe(wanted)}; the model has {_describe(found)}")


def _describe(routers: dict[str, RouterShape]) -> str:
    kinds = sorted({f"top-{shape.top_k} of {shape.num_experts}" for shape in routers.values()})
    names = list(routers)
    return f"{len(names)} routers, {names[0]} to {names[-1]}, {' and '.join(kinds)} experts"
