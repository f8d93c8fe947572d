"""prune_experts: remove the least important experts and their router rows."""

from typing import Any

from torch import Tensor

from .calibration import ExpertStatistics
from .graphs import centrality, deciding_graphs
from .layers import Opened
from .rebuild import NewExpert, kept
from .settings import PruneSettings
from .shrink import shrink


def prune_experts(settings: PruneSettings) -> dict[str, Any]:
    """Remove experts, and write the smaller stock checkpoint. Returns the content of the result file.

    The removed experts are those with the lowest load (`by="load"`), eigenvector centrality in the graph
    (`by="centrality"`) or gate-weighted output norm (`by="reap"`). Their router rows and selection biases are removed
    too, so tokens that would select them use their next best expert.

    Raises:
        SymphonyError: If the model cannot be pruned, or the output exists.

    Source: REAP (arXiv 2510.13999) for `reap`. Deviation: none known. Pruning by centrality is ours.
    """

    def plan(opened: Opened, seen: list[ExpertStatistics]) -> list[list[NewExpert]]:
        if settings.by == "centrality":
            scores = [centrality(graph) for graph in deciding_graphs(opened, seen, settings)]
        else:
            scores = [getattr(own, settings.by) for own in seen]
        return [
            kept(highest(score_E, settings.experts, own.layer.num_groups))
            for score_E, own in zip(scores, seen, strict=True)
        ]

    return shrink(settings, plan, outputs=False, norms=settings.by == "reap")


def highest(score_E: Tensor, num_kept: int, num_groups: int = 1) -> list[int]:
    """Return the indices of the experts with the highest scores, in order; the first of equal ones.

    With `num_groups` groups of adjacent experts, for routers that select groups first, equally many are kept in each.
    """
    size, numbers = len(score_E) // num_groups, list[int]()
    for start in range(0, len(score_E), size):
        order = score_E[start : start + size].argsort(descending=True, stable=True)
        numbers += sorted((start + order[: num_kept // num_groups]).tolist())
    return numbers
