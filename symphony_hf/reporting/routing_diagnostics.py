"""The reader of what `symphony routing` wrote: its own pictures, and its own table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .runs import Run, flat


def read_routing(folder: Path, result: Mapping[str, Any]) -> Run:
    """A folder with `result.json` that has `metrics`, or `layers` by router, and PNGs."""
    metrics = _rows(result["metrics"]) if "metrics" in result else _layers(result)
    captions = result.get("pictures")
    captions = captions if isinstance(captions, Mapping) else {}
    settings = result.get("settings", {})
    pictures = {
        str(captions.get(path.name) or path.stem.replace("_", " ")): path for path in sorted(folder.glob("*.png"))
    }
    about = str(settings.get("model", "")).rstrip("/").rsplit("/", 1)[-1]
    told = [str(line) for line in result.get("findings", [])]
    return Run(
        folder=folder,
        kind="routing diagnostics",
        about=f"how tokens go through {about}" if about else "how tokens go through the experts",
        findings=told or [f"{len(metrics)} rows of numbers, {len(pictures)} pictures."],
        settings=flat({name: value for name, value in settings.items() if name != "output"}),
        pictures=pictures,
        metrics=metrics,
        seconds=float(result["seconds"]) if "seconds" in result else None,
        versions=result.get("versions", {}),
        command=str(result.get("command", "")),
    )


def _layers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each router: its numbers, and not its lists, which have an entry for each expert or domain."""
    layers = result["layers"]
    rows = []
    for router in result.get("routers", layers):
        numbers = {name: value for name, value in flat(layers[router]).items() if isinstance(value, int | float)}
        rows.append({"router": router, **numbers})
    return rows


def _rows(metrics: Any) -> list[dict[str, Any]]:
    """Rows with the same columns, whichever of three forms the file has: rows, rows by name, or numbers by name.

    Raises:
        TypeError: If it has another.
    """
    if isinstance(metrics, Mapping):
        if metrics and all(isinstance(value, Mapping) for value in metrics.values()):
            return [{"of": name, **flat(values)} for name, values in metrics.items()]
        return [{"metric": name, "value": value} for name, value in flat(metrics).items()]
    if isinstance(metrics, list) and all(isinstance(row, Mapping) for row in metrics):
        return [flat(row) for row in metrics]
    raise TypeError(f"`metrics` is {type(metrics).__name__}, not rows or numbers by name")
