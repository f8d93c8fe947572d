"""The reader of what `symphony routing` wrote: its own pictures, and its own table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..diagnostics.names import short_names
from ..observation import captioned, findings, layer_rows
from .commands import command_line
from .runs import Run, flat


def read_routing(folder: Path, result: Mapping[str, Any]) -> Run:
    """A folder with `result.json` that has `layers`, and PNGs."""
    settings, overall = result["settings"], result["overall"]
    told = (
        f"{overall['load_entropy']:.3f} of the load's highest entropy, {overall['dead_experts']:.1%} of experts dead, "
        f"as means over {len(result['routers'])} layers."
    )
    (model,) = short_names([str(settings["model"])])
    return Run(
        folder=folder,
        kind="routing diagnostics",
        about=f"how tokens go through {model}",
        findings=[told, *findings(result)],
        settings=flat({name: value for name, value in settings.items() if name != "output"}),
        pictures=captioned(folder),
        metrics=layer_rows(result),
        seconds=float(result["seconds"]),
        versions=result["versions"],
        command=command_line("routing", settings),
    )
