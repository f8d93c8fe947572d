"""An inspection in the terminal."""

from rich.console import Console
from rich.table import Table

from .inspection import Inspection

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print a model's parts, types, routers and settings."""
    console = console or Console()
    console.print(_parts_table(inspection))
    if inspection.types is not None:
        console.print(_types_table(inspection))
    for routing, count in inspection.routers.items():
        console.print(f"{count} routers: top-{routing.top_k} of {routing.num_experts} experts", highlight=False)
    if not inspection.routers:
        console.print("no routers: the model is dense, or symphony_hf cannot patch its routers", highlight=False)
    if inspection.settings is not None:
        settings = ", ".join(f"{name}={value}" for name, value in inspection.settings.items())
        console.print(f"symphony: {settings}", highlight=False, soft_wrap=True)


def _parts_table(inspection: Inspection) -> Table:
    table = Table(title=inspection.name, title_justify="left", show_footer=True)
    active = inspection.active
    table.add_column("part", footer="all")
    table.add_column("parameters", footer=f"{inspection.total:,}", justify="right")
    table.add_column("share", justify="right")
    table.add_column("active per token", footer="unknown" if active is None else f"{active:,}", justify="right")
    for part in inspection.parts:
        used = "unknown" if part.active is None else f"{part.active:,}"
        table.add_row(part.part.value, f"{part.total:,}", f"{part.total / inspection.total:.2%}", used)
    return table


def _types_table(inspection: Inspection) -> Table:
    types = inspection.types or []
    parameters = sum(count.parameters for count in types)
    size = sum(count.bytes for count in types)
    table = Table(show_footer=True)
    table.add_column("type", footer="all")
    table.add_column("parameters", footer=f"{parameters:,}", justify="right")
    table.add_column("share", justify="right")
    table.add_column("bytes", footer=readable_bytes(size), justify="right")
    table.add_column("share", justify="right")
    for count in types:
        shares = f"{count.parameters / parameters:.2%}", f"{count.bytes / size:.2%}"
        table.add_row(count.type, f"{count.parameters:,}", shares[0], readable_bytes(count.bytes), shares[1])
    return table


def readable_bytes(size: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"
