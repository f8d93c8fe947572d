"""Trainable parameters by role: the table to read before training."""

from dataclasses import dataclass

from rich.console import Console
from torch import nn

from symphony_hf.conversion.inspection.counts import count_parts
from symphony_hf.conversion.inspection.parts import Part
from symphony_hf.tables import Table, TableCell

_ROLES = {
    Part.ROUTERS: "routers",
    Part.GRAPHS: "graphs",
    Part.EXPERTS: "experts",
    Part.ATTENTION: "attention",
}
_OTHERS = "others"


@dataclass(frozen=True)
class TrainableCount:
    """Numbers of parameters of one role: `routers`, `graphs`, `experts`, `attention` or `others`.

    `trainable` counts those that an optimizer would train; `total` includes adapters. Quantized weights count by their
    unpacked shape.
    """

    role: str
    trainable: int
    total: int


def trainable_parameters(model: nn.Module) -> list[TrainableCount]:
    """Count trainable parameters by role, and adapters with the role that they adapt.

    Graphs that follow co-selections are not trained by the optimizer, so none of their parameters are trainable.

    Args:
        model: MoE model of transformers, with adapters or without, also under ZeRO-3.

    Returns:
        Trainable and total parameters of each role that the model has.
    """
    sums = dict.fromkeys((*_ROLES.values(), _OTHERS), (0, 0))
    for count in count_parts(model):
        role = _ROLES.get(count.part, _OTHERS)
        trainable, total = sums[role]
        sums[role] = (trainable + count.trainable, total + count.total)
    return [TrainableCount(role, *pair) for role, pair in sums.items() if pair[1]]


def print_trainable_parameters(model: nn.Module, console: Console | None = None) -> None:
    """Print `trainable_parameters` as a table.

    Args:
        model: MoE model of transformers, with adapters or without, also under ZeRO-3.
        console: Where to print; the terminal when None.
    """
    counts = trainable_parameters(model)
    trainable, total = sum(count.trainable for count in counts), sum(count.total for count in counts)
    header = ("role", "trainable", "share of trainable", "total", "share trained")
    rows = [
        (
            count.role,
            TableCell(f"{count.trainable:,}", count.trainable),
            TableCell(f"{count.trainable / trainable:.2%}" if trainable else "", count.trainable),
            TableCell(f"{count.total:,}", count.total),
            TableCell(f"{count.trainable / count.total:.3%}", count.trainable / count.total),
        )
        for count in counts
    ]
    footer = ("all", f"{trainable:,}", "", f"{total:,}", f"{trainable / total:.3%}")
    Table("Trainable parameters", header, rows, footer=footer).print(console)
