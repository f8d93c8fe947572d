"""Graphs as a criterion for merging and pruning: learned by the model, or counted on the calibration text."""

import torch
from torch import Tensor

from symphony_hf.diagnostics.graph_metrics import coselection_lift
from symphony_hf.errors import GraphError

from .calibration import ExpertStatistics
from .layers import Opened
from .settings import FewerExpertsSettings


def deciding_graphs(opened: Opened, seen: list[ExpertStatistics], settings: FewerExpertsSettings) -> list[Tensor]:
    """Return one adjacency per layer, float32. Raises GraphError if a graph is missing or has no co-selections."""
    where = f"{settings.command}: `{settings.model}`"
    if settings.graph == "counted":
        graphs = [statistics.adjacency for statistics in seen]
    else:
        missing = [layer.router.name for layer in opened.layers if layer.router.name not in opened.graphs]
        if missing:
            raise GraphError(
                f"{where} has no graph at `{missing[0]}`: symphonize and train it, or count co-selections on the "
                "calibration text with --graph counted"
            )
        graphs = [opened.graphs[layer.router.name] for layer in opened.layers]
    for layer, adjacency_EE in zip(opened.layers, graphs, strict=True):
        if not (adjacency_EE - adjacency_EE.diagonal().diag()).any():
            raise GraphError(
                f"{where}: the graph of `{layer.router.name}` has no co-selections, so it cannot be a criterion: "
                "train it, use --graph counted or, for a model with one expert per token, another --by"
            )
    return [adjacency_EE.cpu() for adjacency_EE in graphs]


def centrality(adjacency_EE: Tensor) -> Tensor:
    """Compute the eigenvector centrality of each expert, float64; the diagonal of the graph is ignored.

    It is the leading eigenvector, with norm 1 and no negative entries; 0 for experts outside the heaviest component of
    a disconnected graph.

    Source: Bonacich, "Factoring and weighting approaches to status scores and clique identification" (1972). There is
    no degree centrality: each selection of K experts adds K - 1 pairs to each, so it is the load times K - 1.
    """
    pairs_EE = adjacency_EE.double() - adjacency_EE.double().diagonal().diag()
    return torch.linalg.eigh(pairs_EE).eigenvectors[:, -1].abs()


def graph_distance(adjacency_EE: Tensor) -> Tensor:
    """Compute the distance 1 / (1 + lift) of experts, the lift being their co-selections relative to chance, float64.

    It is 0 on the diagonal, 1/2 for co-selection by chance, and 1 for none.
    """
    return (1.0 / (1.0 + coselection_lift(adjacency_EE))).fill_diagonal_(0.0)
