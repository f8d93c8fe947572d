"""The result files of the benches, what they say about the machine, and the tables printed from them."""

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from symphony_hf.compat import versions
from symphony_hf.files import write_json
from symphony_hf.tables import Table, TableCell


def write_result(output: str | Path, values: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Write measurements with the machine, the versions and the path of the file, and return all of them."""
    on_gpu = device is not None and device.type == "cuda"
    result = {
        **values,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "output": str(output),
    }
    write_json(Path(output), result)
    return result


def print_result(result: Mapping[str, Any], tables: Iterable[Table], console: Console | None = None) -> None:
    """Print the tables of a result, and the path of its file."""
    console = console or Console()
    for table in tables:
        table.print(console)
    console.print(f"Written to {Path(result['output']).resolve()}", highlight=False, soft_wrap=True)


def number_cell(value: float, form: str = ",", unit: str = "") -> TableCell:
    """Format a number for a table."""
    return TableCell(f"{value:{form}}{unit}", value)


def range_cell(low: float, high: float, form: str) -> TableCell:
    """Format a pair of quartiles for a table."""
    return TableCell(f"{low:{form}} to {high:{form}}", low)
