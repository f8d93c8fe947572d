"""inspect_model: the content of `symphony inspect`, for a loaded model or a checkpoint whose weights are not read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from symphony_hf.checkpoints.model_class import empty_model
from symphony_hf.tables import Table, TableCell

from .counts import PartCount, TypeCount, count_parts, held_types, stored_types
from .parts import Anatomy, Routing
from .tensors import base_of


@dataclass(frozen=True)
class Inspection:
    """Parts, types and routers of a model.

    Attributes:
        name: Class name of the model.
        parts: Parameters by part.
        types: Data types of a checkpoint as stored, or of a loaded model in memory; None if there is only a config.
        routers: Number of routers of each kind.
        settings: Settings of the expert graphs in the config; None if there are none.
    """

    name: str
    parts: list[PartCount]
    types: list[TypeCount] | None
    routers: Mapping[Routing, int]
    settings: Mapping[str, Any] | None

    @property
    def total(self) -> int:
        """Number of all parameters, including the entries of the graphs."""
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int | None:
        """Number of parameters that one token uses; None if no router is known."""
        return None if any(part.active is None for part in self.parts) else sum(part.active or 0 for part in self.parts)


def inspect_model(model: nn.Module | str | Path, revision: str | None = None) -> Inspection:
    """Inspect a model's parts, types and routers.

    Args:
        model: Loaded model, wrapped or on the meta device or neither; or a checkpoint's folder, config.json, or name on
            the Hub, whose weights are not read.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Parameters by part, bytes by type, routers and Symphony settings.

    Raises:
        ConfigError: If there is no config, or transformers does not know its model type.
        DataError: If a checkpoint's files cannot be read.
    """
    if isinstance(model, nn.Module):
        return _inspect(model, held_types(model))
    return _inspect(empty_model(model, revision), stored_types(model, revision))


def _inspect(model: nn.Module, types: list[TypeCount] | None) -> Inspection:
    anatomy = Anatomy(model)
    bare = base_of(model)
    return Inspection(
        name=type(bare).__name__,
        parts=count_parts(model, anatomy),
        types=types,
        routers=Counter(anatomy.routers.values()),
        settings=getattr(getattr(bare, "config", None), "symphony", None),
    )


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print a model's parts, types, routers and settings.

    Args:
        inspection: What `inspect_model` returned.
        console: Where to print; the terminal when None.
    """
    console = console or Console()
    _parts_table(inspection).print(console)
    if inspection.types is not None:
        _types_table(inspection.types).print(console)
    for routing, count in inspection.routers.items():
        console.print(f"{count} routers: top-{routing.top_k} of {routing.num_experts} experts", highlight=False)
    if not inspection.routers:
        console.print("no routers: the model is dense, or symphony_hf cannot patch its routers", highlight=False)
    if inspection.settings is not None:
        settings = ", ".join(f"{name}={value}" for name, value in inspection.settings.items())
        console.print(f"symphony: {settings}", highlight=False, soft_wrap=True)


def _parts_table(inspection: Inspection) -> Table:
    rows = [
        [
            part.part.value,
            TableCell(f"{part.total:,}", part.total),
            TableCell(f"{part.total / inspection.total:.2%}", part.total),
            TableCell("unknown" if part.active is None else f"{part.active:,}", part.active),
        ]
        for part in inspection.parts
    ]
    active = "unknown" if inspection.active is None else f"{inspection.active:,}"
    header = ("part", "parameters", "share", "active per token")
    return Table(inspection.name, header, rows, footer=("all", f"{inspection.total:,}", "", active))


def _types_table(types: list[TypeCount]) -> Table:
    parameters, size = sum(count.parameters for count in types), sum(count.bytes for count in types)
    rows: list[list[TableCell | str]] = [
        [
            count.type,
            TableCell(f"{count.parameters:,}", count.parameters),
            TableCell(f"{count.parameters / parameters:.2%}", count.parameters),
            TableCell(readable_bytes(count.bytes), count.bytes),
            TableCell(f"{count.bytes / size:.2%}", count.bytes),
        ]
        for count in types
    ]
    header = ("type", "parameters", "share", "bytes", "share")
    return Table("", header, rows, footer=("all", f"{parameters:,}", "", readable_bytes(size), ""))


def readable_bytes(size: int) -> str:
    """Return a number of bytes in the largest unit in which it is at least 1."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"
