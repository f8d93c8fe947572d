"""What is looked at now and then while training, since it goes wrong in silence: optimizers, and the ranks' graphs."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .graph import ExpertGraph

_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""An odd number without pattern, as an int64: what is multiplied by it can be told apart afterwards."""


def left_out(
    routers: Iterable[tuple[str, nn.Module]], parameters: Iterable[nn.Parameter], held: set[int]
) -> tuple[list[str], int]:
    """The router parameters that should be trained and that no optimizer holds.

    Args:
        routers: With their names.
        parameters: Of the model around them.
        held: The identities of what the optimizers hold.

    Returns:
        Their names, and of how many. None are missing where the optimizers hold none of the model's own parameters:
        sharded ones hold flat copies.
    """
    named = [
        (f"{name}.{parameter_name}", parameter)
        for name, router in routers
        for parameter_name, parameter in router.named_parameters()
        if parameter.requires_grad
    ]
    missing = [name for name, parameter in named if id(parameter) not in held]
    if missing and any(id(parameter) in held for parameter in parameters):
        return missing, len(named)
    return [], len(named)


def fingerprint(graph: ExpertGraph) -> Tensor:
    """A hash of a graph's bits, each at its place, and of how many updates it has seen.

    Returns:
        An int64 scalar. Products and sums wrap around in it.
    """
    bits = graph.adjacency.detach().contiguous().view(torch.int32).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _MULTIPLIER
    mixed = (bits + 1) * (places | 1)
    return (mixed ^ (mixed >> 29)).sum() + graph.updates.to(bits.device) * _MULTIPLIER


def num_differing(graphs: Sequence[ExpertGraph], device: torch.device) -> int:
    """How many graphs are not the same on all ranks. One all-reduce, which every rank must take part in."""
    own = torch.stack([fingerprint(graph).cpu() for graph in graphs])
    extremes = torch.cat([own, ~own]).to(device)  # `~` turns the order around, and cannot overflow
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes[: len(own)], ~extremes[len(own) :]
    return int((highest != lowest).sum())
