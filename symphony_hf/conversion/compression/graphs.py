"""The graph that decides: the one that the model learned, or one counted on the calibration text."""

import torch
from torch import Tensor

from symphony_hf.diagnostics.graph_metrics import coselection_lift
from symphony_hf.errors import GraphError

from .calibration import ExpertStatistics
from .layers import Opened
from .settings import FewerExpertsSettings


def deciding_graphs(opened: Opened, seen: list[ExpertStatistics], settings: FewerExpertsSettings) -> list[Tensor]:
    """One adjacency a layer. Shape of each: (num_experts, num_experts), float32.

    Raises:
        GraphError: If a learned graph is wanted where there is none, or no two experts were ever chosen together.
    """
    where = f"{settings.command}: `{settings.model}`"
    if settings.graph == "counted":
        graphs = [statistics.adjacency for statistics in seen]
    else:
        missing = [layer.router.name for layer in opened.layers if layer.router.name not in opened.graphs]
        if missing:
            raise GraphError(
                f"{where} has no graph at `{missing[0]}`: symphonize and train it, or count who is chosen together in "
                "the calibration text, with --graph counted"
            )
        graphs = [opened.graphs[layer.router.name] for layer in opened.layers]
    for layer, adjacency_EE in zip(opened.layers, graphs, strict=True):
        if not (adjacency_EE - adjacency_EE.diagonal().diag()).any():
            raise GraphError(
                f"{where}: in the graph of `{layer.router.name}` no two experts were chosen together, so it decides "
                "nothing: train it, take --graph counted, or, of a model with one expert a token, another --by"
            )
    return [adjacency_EE.cpu() for adjacency_EE in graphs]


def centrality(adjacency_EE: Tensor) -> Tensor:
    """Eigenvector centrality: an expert counts as much as those that it is chosen with, weighted by how often.

    Args:
        adjacency_EE: A co-selection graph; its diagonal is left out. Shape: (num_experts, num_experts).

    Returns:
        The leading eigenvector, of length 1, not negative, float64; 0 for experts outside the heaviest part of a graph
        that falls into parts. Shape: (num_experts,).

    Source: Bonacich, "Factoring and weighting approaches to status scores and clique identification" (1972). Degree is
    not offered: every choice of K experts adds K - 1 pairs to each, so an expert's degree is its load times K - 1.
    """
    pairs_EE = adjacency_EE.double() - adjacency_EE.double().diagonal().diag()
    return torch.linalg.eigh(pairs_EE).eigenvectors[:, -1].abs()


def graph_distance(adjacency_EE: Tensor) -> Tensor:
    """How far apart two experts are: 1 / (1 + lift), the lift being how much more than by their loads alone they meet.

    Args:
        adjacency_EE: A co-selection graph. Shape: (num_experts, num_experts).

    Returns:
        0 on the diagonal; 1/2 for experts that meet by chance, 1 for some that never do. Same shape, float64.
    """
    return (1.0 / (1.0 + coselection_lift(adjacency_EE))).fill_diagonal_(0.0)
