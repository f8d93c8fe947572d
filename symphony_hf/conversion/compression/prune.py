"""prune_experts: the experts that matter least go, with their router rows."""

from typing import Any

from torch import Tensor

from .calibration import ExpertStatistics
from .graphs import centrality, deciding_graphs
from .layers import Opened
from .rebuild import NewExpert, kept
from .settings import PruneSettings
from .shrink import shrink


def prune_experts(settings: PruneSettings) -> dict[str, Any]:
    """Drop experts, and write the smaller stock checkpoint.

    `by="load"`: those that the fewest calibration tokens choose. `by="centrality"`: those of the least eigenvector
    centrality in the graph. `by="reap"`: those of the least gate-weighted output norm. Their router rows go with them,
    and the entries of a bias that selects, so a token that would have chosen them takes its next best.

    Args:
        settings: Which model, how many experts to keep, and on what text.

    Returns:
        As `merge_experts`.

    Raises:
        SymphonyError: If the model is not one that can be pruned, or the output exists.

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
    """The numbers of the experts with the highest scores, in order; of equal ones the first.

    Args:
        score_E: Shape: (num_experts,).
        num_kept: How many.
        num_groups: Of a router that first chooses among groups of neighbouring experts: as many are kept of each.
    """
    size, numbers = len(score_E) // num_groups, list[int]()
    for start in range(0, len(score_E), size):
        order = score_E[start : start + size].argsort(descending=True, stable=True)
        numbers += sorted((start + order[: num_kept // num_groups]).tolist())
    return numbers
