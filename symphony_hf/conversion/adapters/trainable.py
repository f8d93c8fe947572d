"""Which parameters are trained, by their role: the table to look at before training."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from symphony_hf.conversion.inspection.counts import count_parts
from symphony_hf.conversion.inspection.parts import Part

_ROLES = {
    Part.ROUTERS: "routers",
    Part.GRAPHS: "graphs",
    Part.EXPERTS: "experts",
    Part.ATTENTION: "attention",
}
_OTHERS = "others"


@dataclass(frozen=True)
class TrainableCount:
    """The parameters of one role.

    Attributes:
        role: routers, graphs, experts, attention or others.
        trainable: Those that an optimizer would train.
        total: All, with adapters. A quantized weight counts as what it stands for.
    """

    role: str
    trainable: int
    total: int


def trainable_parameters(model: nn.Module) -> list[TrainableCount]:
    """Count what is trained, by role, adapters with what they adapt.

    Graphs that move by counting are not trained by the optimizer, so they have none here.

    Args:
        model: Any MoE model of transformers, with adapters or without; also under ZeRO-3.
    """
    sums = dict.fromkeys((*_ROLES.values(), _OTHERS), (0, 0))
    for count in count_parts(model):
        role = _ROLES.get(count.part, _OTHERS)
        trainable, total = sums[role]
        sums[role] = (trainable + count.trainable, total + count.total)
    return [TrainableCount(role, *pair) for role, pair in sums.items() if pair[1]]


def print_trainable_parameters(model: nn.Module, console: Console | None = None) -> None:
    """Print `trainable_parameters` as a table."""
    counts = trainable_parameters(model)
    trainable, total = sum(count.trainable for count in counts), sum(count.total for count in counts)
    table = Table(title="Trainable parameters", title_justify="left", show_footer=True)
    table.add_column("role", footer="all")
    table.add_column("trainable", footer=f"{trainable:,}", justify="right")
    table.add_column("share of trainable", justify="right")
    table.add_column("total", footer=f"{total:,}", justify="right")
    table.add_column("share trained", footer=f"{trainable / total:.3%}", justify="right")
    for count in counts:
        share = f"{count.trainable / trainable:.2%}" if trainable else ""
        table.add_row(
            count.role, f"{count.trainable:,}", share, f"{count.total:,}", f"{count.trainable / count.total:.3%}"
        )
    (console or Console()).print(table)
