"""Record beside an adapter: its graph settings and its base model, which PEFT's own files do not contain.

PEFT saves an adapter's config with the config's `save_pretrained`, which `peft_wraps` wraps, so that it writes the
record that the config holds. The record is also in adapter_config.json, where `peft_wraps` finds it. A `task_type` that
PEFT refuses, with the name of this package, keeps PEFT alone from loading such an adapter onto a model without graphs.
"""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from symphony_hf.checkpoints.marks import MARK, NEEDED
from symphony_hf.config import SymphonyConfig
from symphony_hf.conversion.inspection.parts import Routing
from symphony_hf.conversion.inspection.tensors import bare_name
from symphony_hf.errors import ConfigError
from symphony_hf.files import ADAPTER_CONFIG, ADAPTER_RECORD, read_object, write_json
from symphony_hf.patching.expert_graph import ExpertGraph, active_graph
from symphony_hf.patching.symphonize import is_symphonized, symphony_routers
from symphony_hf.settings import parse_settings

from .base_weights import sample_weights

FORMAT = 1
"""Format of the record. Higher numbers are refused."""

NEEDS = "_symphony_needs"
"""Attribute of an adapter's config from a file: its record, or the settings of its graphs if they are all it has."""

_RECORD = "_symphony_record"
"""Attribute of an adapter's config: the record that is written wherever the config is saved."""

RouterMode = Literal["graph", "train"]


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """Requirements of an adapter with graphs.

    Attributes:
        router: `graph`: the adapter has the graphs. `train`: it has the routers with their graphs.
        symphony: Settings of the graphs, as in a checkpoint's config.json.
        routers: Routers of the base model, by name.
        model_type: Model type of the base model.
        base_model: Name or path of the base model, if PEFT knows it.
        base_weights: A few values of the base model's weights, by parameter name; none in earlier records.
        format: Format of the record.
    """

    router: RouterMode
    symphony: dict[str, Any]
    routers: dict[str, Routing]
    model_type: str | None = None
    base_model: str | None = None
    base_weights: dict[str, list[float]] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not self.routers:
            raise ConfigError("`routers` is empty")
        _ = self.settings

    @property
    def settings(self) -> SymphonyConfig:
        """Settings of the graphs."""
        return SymphonyConfig.from_stored(self.symphony)

    @classmethod
    def of(cls, model: nn.Module, router: RouterMode) -> "AdapterRecord":
        """Return the record of an adapter for a Symphony model.

        Raises:
            PatchError: If the model is not symphonized.
        """
        found = list(symphony_routers(model))
        shapes = {bare_name(name): Routing.of(router.contract) for name, router in found}
        return cls(
            router=router,
            symphony=active_graph(found[0][1].symphony).config.to_dict(),
            routers=shapes,
            model_type=getattr(getattr(model, "config", None), "model_type", None),
            base_weights=sample_weights(model, list(shapes)),
        )

    @classmethod
    def read(cls, folder: str | Path) -> "AdapterRecord":
        """Read the record beside an adapter. Raises ConfigError if it is missing or invalid, or has a newer format."""
        file = Path(folder) / ADAPTER_RECORD
        if not file.exists():
            raise ConfigError(
                f"`{folder}` has no {ADAPTER_RECORD}: its adapter has no graphs, or an early symphony_hf saved it, "
                "without `lora_config`: load it with PEFT, onto a model that is ready for it"
            )
        return cls.parse(read_object(file, ConfigError), str(file))

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> "AdapterRecord":
        """Return the record with these values.

        Raises:
            ConfigError: If they are invalid, or of a newer format.
        """
        version = values.get("format") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise ConfigError(f"`{where}` has format {version}, this symphony_hf reads up to {FORMAT}: upgrade it")
        return parse_settings(cls, values, where)


def keep_record(config: Any, record: AdapterRecord) -> Any:
    """Make PEFT write a record whenever it saves the adapter of this config, or of a copy of it. Returns the config."""
    config.__dict__[_RECORD] = record
    return config


def kept_record(config: Any) -> AdapterRecord | None:
    """Return the record that PEFT writes when it saves the adapter of this config; None if there is none."""
    record: AdapterRecord | None = config.__dict__.get(_RECORD)
    return record


def without_record(config: Any) -> Any:
    """Return a copy of a config, for which PEFT writes no record."""
    copied = copy.copy(config)
    copied.__dict__.pop(_RECORD, None)
    return copied


def save_with_record(save: Callable[..., None], record: AdapterRecord, save_directory: str, **kwargs: Any) -> None:
    """Save an adapter's config with its record, in it and beside it.

    Args:
        save: PEFT's own `save_pretrained` of the config.
        record: The record.
        save_directory: The adapter's folder.
        **kwargs: Further arguments of `save`.
    """
    with tempfile.TemporaryDirectory() as scratch:  # the adapter's folder never has a config without the marks
        save(scratch, **kwargs)
        stored = json.loads((Path(scratch) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    folder = Path(save_directory)
    record = dataclasses.replace(record, base_model=stored.get("base_model_name_or_path"))
    values = dataclasses.asdict(record)
    marks = {"task_type": NEEDED, MARK: {"replaced": {"task_type": stored.get("task_type")}, "record": values}}
    write_json(folder / ADAPTER_RECORD, values)
    write_json(folder / ADAPTER_CONFIG, stored | {"symphony": record.symphony} | marks)


def graphs_in_adapter(model: nn.Module, adapter: str) -> RouterMode | None:
    """Return whether an adapter of a model has the routers with their graphs, only the graphs, or neither."""
    for copies in _modules_to_save(model):
        if adapter not in copies:
            continue
        if is_symphonized(copies[adapter]):
            return "train"
        if isinstance(copies[adapter], ExpertGraph):
            return "graph"
    return None


def check_same_mode(model: nn.Module, router: RouterMode, where: str) -> None:
    """Check that the adapters of a model have what a new one would have: routers, or graphs alone.

    Args:
        model: Model with or without adapters.
        router: Mode of the new adapter.
        where: Where that is from, for the error message.

    Raises:
        ConfigError: If an adapter has the other.
    """
    for adapter in getattr(model, "peft_config", {}):
        mode = graphs_in_adapter(model, adapter)
        if mode not in (None, router):
            raise ConfigError(
                f"{where}: router={router!r}, but the model's adapter `{adapter}` has router={mode!r}: PEFT cannot "
                "hold a router in one adapter and its graph alone in another, so give the same, or use two models"
            )


def check_not_repeated(replication: Any, where: str) -> None:
    """Check that an adapter does not repeat layers of the model.

    Args:
        replication: The config's `layer_replication`.
        where: Where that is from, for the error message.

    Raises:
        ConfigError: If it does.
    """
    if replication:
        raise ConfigError(
            f"{where}: `layer_replication` is {replication!r}: the routers of repeated layers would have graphs of "
            "their own, and an adapter with these cannot be loaded onto the base model: leave it out"
        )


@torch.no_grad()
def copy_graphs(model: nn.Module, source: str, target: str) -> None:
    """Copy the graphs, and other buffers of the routers, from one adapter of a model into another."""
    for copies in _modules_to_save(model):
        if {source, target} <= copies.keys():
            buffers = dict(copies[source].named_buffers())
            for name, buffer in copies[target].named_buffers():
                buffer.copy_(buffers[name])


def _modules_to_save(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Yield, for each module that adapters have copies of, these copies by the adapters' names."""
    for wrapper in model.modules():
        copies = wrapper._modules.get("modules_to_save")
        if copies is not None:
            yield dict(copies.named_children())
