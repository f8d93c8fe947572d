"""The plan of a recipe, printed to the terminal."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from symphony_hf.errors import ConfigError
from symphony_hf.tables import Table, TableCell
from symphony_hf.training.precision import REMEDY

from .plan import MAX_MICRO_BATCH_SIZE, USABLE, Plan, PlanRow

if TYPE_CHECKING:
    from rich.console import Console

Cells = list[TableCell | str]

_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "graph": "graph",
    "buffers": "buffers",
}
"""Column name of each part: short, so that a table fits in 80 characters."""


def print_plan(plan: Plan, console: "Console | None" = None) -> None:
    """Print a plan: memory of a GPU and of a host by part, and the duration of the run."""
    from rich.console import Console

    console = console or Console()
    for table in (_gpu_table(plan), _host_table(plan), _run_table(plan)):
        if table.rows:
            table.print(console, box=None, padding=(0, 1, 0, 0))
            console.print()
    for name, why in plan.left_out.items():
        console.print(f"{name} is left out: {why}", highlight=False)
    if plan.rounding:
        console.print(
            f"{', '.join(plan.rounding)}: weights would be trained in 16 bits, where small steps are rounded away: "
            f"{REMEDY}",
            highlight=False,
        )
    settings, machine = plan.settings, plan.machine
    checkpointing = "with" if settings.checkpointing else "without"
    console.print(
        f"{plan.states.total:,} parameters, {plan.states.num_trained:,} trained by {settings.optimizer}; "
        f"micro-batch {settings.micro_batch} x {plan.block_size:,} tokens, {settings.accumulation} per step, "
        f"{checkpointing} gradient checkpointing. Fits: uses at most {USABLE:.0%} of "
        f"{machine.gpu_memory / 1e9:g} GB. Hours: {plan.flops_per_sequence / 1e12:,.3g} TFLOPs per sequence, at "
        f"{machine.utilization:.0%} of {machine.gpu_flops / 1e12:g} TFLOP/s per GPU. A GB is 10^9 bytes. Assumes full "
        "sequences and evenly chosen experts.",
        highlight=False,
    )


class _Sizes:
    """Cells for sizes in one unit: GB, or MB if none of them reaches a GB."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._unit, self.name = (1e9, "GB") if max(sizes, default=0) >= 1e9 else (1e6, "MB")

    def __call__(self, size: int | None, mark: str = "") -> TableCell:
        if not size:
            return TableCell("" if size is None else "0", size)
        return TableCell((f"{size / self._unit:,.1f}" if size >= 0.05 * self._unit else "<0.1") + mark, size)


def _count(number: int) -> TableCell:
    return TableCell(f"{number:,}", number)


def _gpu_table(plan: Plan) -> Table:
    planned = [row for row in plan.rows if row.launch.on_gpu]
    sizes = _Sizes(row.memory.gpu_total for row in planned)
    rows: list[Cells] = [
        [
            row.launch.name,
            _count(row.processes),
            *(sizes(row.memory.gpu[part]) for part in _PARTS),
            sizes(row.memory.gpu_total, "" if row.memory.gpu_total <= USABLE * plan.machine.gpu_memory else "*"),
            _micro_batch(row.max_micro_batch_size or 0),
        ]
        for row in planned
    ]
    caption = "fits: the largest micro-batch size that fits; *: the recipe's own does not fit"
    header = ("launch", "GPUs", *_PARTS.values(), "total", "fits")
    return Table(f"{sizes.name} of one GPU", header, rows, caption=caption)


def _micro_batch(size: int) -> TableCell:
    more = "+" if size == MAX_MICRO_BATCH_SIZE else ""
    return TableCell(f"{size:,}{more}" if size else "no", size)


def _host_table(plan: Plan) -> Table:
    sizes = _Sizes(row.memory.host_total for row in plan.rows)
    rows: list[Cells] = [
        [
            row.launch.name,
            _count(row.processes),
            sizes(row.memory.loading or None),
            *(sizes(row.memory.host.get(part)) for part in _PARTS),
            sizes(row.memory.host_total),
        ]
        for row in plan.rows
    ]
    return Table(f"{sizes.name} of one machine", ("launch", "procs", "loading", *_PARTS.values(), "peak"), rows)


def _run_table(plan: Plan) -> Table:
    rows: list[Cells] = [
        [
            row.launch.name,
            _count(row.processes),
            _count(plan.settings.micro_batch * plan.settings.accumulation * row.processes),
            "give --sequences" if row.sequences is None else _count(row.sequences * plan.block_size),
            _hours(row),
        ]
        for row in plan.rows
    ]
    return Table("The whole run", ("launch", "procs", "sequences per step", "tokens", "hours"), rows)


def _hours(row: PlanRow) -> TableCell:
    if row.hours is None:
        return TableCell("")
    return TableCell(f"{row.hours:,.1f}" if row.hours >= 0.05 else "<0.1", row.hours)


_UNITS = {"B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Parse a size such as `80GB`, `79.6 GiB` or `512 MB`. A GB is 10^9 bytes, a GiB 2^30.

    Raises:
        ConfigError: If the text is not a size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?B)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"`{text}` is not a size: expected a number above 0 and a unit, such as 80GB or 79.6GiB")
    return round(float(match[1]) * _UNITS[match[2]])
