"""merge_experts: merge each cluster of similar experts into one."""

from typing import Any

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from .calibration import ExpertStatistics
from .graphs import deciding_graphs, graph_distance
from .layers import Opened
from .rebuild import NewExpert
from .settings import MergeSettings
from .shrink import shrink


def cluster_experts(distance_EE: Tensor, num_clusters: int, num_groups: int = 1) -> list[list[int]]:
    """Cluster experts by agglomerative clustering with average linkage, from symmetric distances.

    Args:
        distance_EE: Distances, 0 on the diagonal.
        num_clusters: Number of clusters.
        num_groups: Number of groups of adjacent experts, for routers that select groups first. Clusters stay within a
            group, and every group has equally many.

    Returns:
        Sorted members of each cluster, ordered by the first.

    Source: HC-SMoE (arXiv 2410.08589), whose best linkage this is. Deviation: one variant there has different numbers
    of clusters per layer; here they are equal.
    """
    distances, size = distance_EE.double().numpy(), len(distance_EE) // num_groups
    clusters: list[list[int]] = []
    for start in range(0, len(distances), size):
        own = distances[start : start + size, start : start + size]
        members = _cluster(own, num_clusters // num_groups)
        clusters += [[start + member for member in cluster] for cluster in members]
    return clusters


def _cluster(distances: np.ndarray, num_clusters: int) -> list[list[int]]:
    if len(distances) == 1:
        return [[0]]
    # `checks=False` because the distances are symmetric only up to rounding; it reads the upper triangle.
    tree = hierarchy.linkage(squareform(distances, checks=False), "average")
    labels = hierarchy.cut_tree(tree, n_clusters=[num_clusters]).ravel()
    clusters = [np.flatnonzero(labels == label).tolist() for label in range(num_clusters)]
    return sorted(clusters)


def merge_experts(settings: MergeSettings) -> dict[str, Any]:
    """Merge clusters of a model's experts, and write the smaller stock checkpoint.

    With `by="outputs"`, experts are close if their mean outputs on the calibration tokens are. With `by="graph"`, they
    are close if they are selected together more often than by chance. The weights and the router row of a merged expert
    are the means of its members', weighted by their loads (see `with_fewer_experts`).

    Returns:
        Content of the result file: clusters, perplexity on held-out text before and after with intervals, their ratio
        with its verdict, parameters, scores by document, command and versions.

    Raises:
        SymphonyError: If the model cannot be merged, or the output exists.

    Source: HC-SMoE (arXiv 2410.08589) for `outputs`: average linkage of the Euclidean distances of mean outputs over
    all calibration tokens, merged by frequency. Deviation: router rows are merged too, since stock checkpoints need one
    per expert. Clustering by the graph is ours.
    """

    def plan(opened: Opened, seen: list[ExpertStatistics]) -> list[list[NewExpert]]:
        if settings.by == "outputs":
            distances = [torch.cdist(own.mean_outputs, own.mean_outputs) for own in seen]
        else:
            distances = [graph_distance(graph) for graph in deciding_graphs(opened, seen, settings)]
        return [
            [_merged(cluster, own) for cluster in cluster_experts(distance, settings.experts, own.layer.num_groups)]
            for distance, own in zip(distances, seen, strict=True)
        ]

    return shrink(settings, plan, outputs=settings.by == "outputs", norms=False)


def _merged(cluster: list[int], statistics: ExpertStatistics) -> NewExpert:
    """Merge a cluster weighted by load, or evenly if none of its experts was ever selected."""
    load = statistics.load[cluster]
    shares = load / load.sum() if load.sum() > 0 else torch.full_like(load, 1 / len(cluster))
    return NewExpert(tuple(cluster), tuple(shares.tolist()))
