"""A plan in the terminal."""

import re
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from symphony_hf.errors import ConfigError

from .plan import MOST_SEQUENCES, USABLE, Plan, Row

_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "graph": "graph",
    "buffers": "buffers",
}
"""Part -> its column: short, since a table is to fit 80 characters."""


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan: memory of a GPU by part, memory of a host, and how long the run takes."""
    console = console or Console()
    for table in (_gpu_table(plan), _host_table(plan), _run_table(plan)):
        if table.row_count:
            console.print(table)
            console.print()
    for name, why in plan.left_out.items():
        console.print(f"{name} is left out: {why}", highlight=False)
    settings, machine = plan.settings, plan.machine
    checkpointing = "with" if settings.checkpointing else "without"
    console.print(
        f"{plan.states.total:,} parameters, {plan.states.num_trained:,} trained by {settings.optimizer}; "
        f"micro-batch {settings.micro_batch} x {plan.block_size:,} tokens, {settings.accumulation} to a step, "
        f"{checkpointing} gradient checkpointing. Fits: at most {USABLE:.0%} of "
        f"{machine.gpu_memory / 1e9:g} GB. Hours: {plan.flops_per_sequence / 1e12:,.3g} TFLOPs a sequence, at "
        f"{machine.utilization:.0%} of {machine.gpu_flops / 1e12:g} TFLOP/s a GPU. A GB is 10^9 bytes. Sequences are "
        "taken to be full, and experts to be chosen evenly.",
        highlight=False,
    )


class _Sizes:
    """Sizes in one unit for a table: GB, or MB where nothing has one."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._unit, self.name = (1e9, "GB") if max(sizes, default=0) >= 1e9 else (1e6, "MB")

    def __call__(self, size: int | None) -> str:
        if not size:
            return "" if size is None else "0"
        return f"{size / self._unit:,.1f}" if size >= 0.05 * self._unit else "<0.1"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "launch" else "right", no_wrap=True)
    return table


def _gpu_table(plan: Plan) -> Table:
    rows = [row for row in plan.rows if row.launch.on_gpu]
    sizes = _Sizes(row.memory.gpu_total for row in rows)
    table = _table(f"{sizes.name} of one GPU", "launch", "GPUs", *_PARTS.values(), "total", "fits")
    table.caption = "fits: the largest micro-batch that does; red: the recipe's own does not"
    for row in rows:
        fits = (
            f"{row.most_sequences:,}{'+' if row.most_sequences == MOST_SEQUENCES else ''}"
            if row.most_sequences
            else "no"
        )
        parts = (sizes(row.memory.gpu[part]) for part in _PARTS)
        style = "red" if row.memory.gpu_total > USABLE * plan.machine.gpu_memory else None
        table.add_row(row.launch.name, str(row.processes), *parts, sizes(row.memory.gpu_total), fits, style=style)
    return table


def _host_table(plan: Plan) -> Table:
    sizes = _Sizes(row.memory.host_total for row in plan.rows)
    table = _table(f"{sizes.name} of one machine", "launch", "procs", "loading", *_PARTS.values(), "most")
    for row in plan.rows:
        parts = (sizes(row.memory.host.get(part)) for part in _PARTS)
        loading = sizes(row.memory.loading or None)
        table.add_row(row.launch.name, str(row.processes), loading, *parts, sizes(row.memory.host_total))
    return table


def _run_table(plan: Plan) -> Table:
    table = _table("The whole run", "launch", "procs", "sequences a step", "tokens", "hours")
    for row in plan.rows:
        a_step = plan.settings.micro_batch * plan.settings.accumulation * row.processes
        tokens = "give --sequences" if row.sequences is None else f"{row.sequences * plan.block_size:,}"
        table.add_row(row.launch.name, str(row.processes), f"{a_step:,}", tokens, _hours(row))
    return table


def _hours(row: Row) -> str:
    if row.hours is None:
        return ""
    return f"{row.hours:,.1f}" if row.hours >= 0.05 else "<0.1"


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Read a size: `80GB`, `79.6 GiB`, `512 MB`. A GB is 10^9 bytes, a GiB 2^30.

    Raises:
        ConfigError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"`{text}` is no size: expected a number above 0 and a unit, such as 80GB or 79.6GiB")
    return round(float(match[1]) * _UNITS[match[2]])
