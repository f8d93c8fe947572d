"""inspect_model: everything that `symphony inspect` shows, of a loaded model or of a checkpoint's description."""

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


@dataclass(frozen=True)
class Inspection:
    """What a model is made of.

    Attributes:
        name: Its class.
        parts: Its parameters by part.
        types: The types of its tensors: as stored, or, of a loaded model, as in memory; None where there is no more
            than a config.
        routers: How many routers choose what.
        settings: Of its expert graphs, as its config has them; None where it has none.
    """

    name: str
    parts: list[PartCount]
    types: list[TypeCount] | None
    routers: Mapping[Routing, int]
    settings: Mapping[str, Any] | None

    @property
    def total(self) -> int:
        """All parameters, and the entries of the graphs."""
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int | None:
        """Those of them that one token uses; None where no router says how many experts that are."""
        return None if any(part.active is None for part in self.parts) else sum(part.active or 0 for part in self.parts)


def inspect_model(model: nn.Module | str | Path, revision: str | None = None) -> Inspection:
    """Look at a model's parts, types and routers.

    Args:
        model: A loaded model, wrapped or not, or one on the meta device; or a checkpoint's folder, its config.json, or
            its name on the Hub, of which no weights are read.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: If there is no config, or it is of no model that transformers knows.
        DataError: If a checkpoint's files cannot be read.
    """
    if isinstance(model, nn.Module):
        return _inspect(model, held_types(model))
    return _inspect(empty_model(model, revision), stored_types(model, revision))


def _inspect(model: nn.Module, types: list[TypeCount] | None) -> Inspection:
    anatomy = Anatomy(model)
    bare = anatomy.modules[""]
    return Inspection(
        name=type(bare).__name__,
        parts=count_parts(model, anatomy),
        types=types,
        routers=Counter(anatomy.routers.values()),
        settings=getattr(getattr(bare, "config", None), "symphony", None),
    )


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print a model's parts, types, routers and settings."""
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
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"
