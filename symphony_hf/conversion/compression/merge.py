"""merge_experts: clusters of experts that are alike become one expert each."""

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
    """Merge the two nearest clusters, by the mean distance of their members, until there are as many as wanted.

    Args:
        distance_EE: Symmetric, 0 on the diagonal. Shape: (num_experts, num_experts).
        num_clusters: Wanted.
        num_groups: Of a router that first chooses among groups of neighbouring experts: a cluster stays within one,
            and each group gets as many clusters.

    Returns:
        The members of each cluster, sorted, by the number of the first.

    Source: HC-SMoE (arXiv 2410.08589), agglomerative clustering with average linkage, its best. Deviation: there the
    number of clusters may differ by layer in one variant; here it never does.
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
    # Symmetric to rounding only, which `squareform` would refuse: it reads the upper triangle.
    tree = hierarchy.linkage(squareform(distances, checks=False), "average")
    labels = hierarchy.cut_tree(tree, n_clusters=[num_clusters]).ravel()
    clusters = [np.flatnonzero(labels == label).tolist() for label in range(num_clusters)]
    return sorted(clusters)


def merge_experts(settings: MergeSettings) -> dict[str, Any]:
    """Merge a model's experts in clusters, and write the smaller stock checkpoint.

    `by="outputs"`: experts are near whose mean outputs over the calibration tokens are. `by="graph"`: experts are near
    that are chosen together more than their loads explain. A merged expert's weights are the mean of its members',
    weighted by how often each was chosen; so is its router row (see `with_fewer_experts`).

    Args:
        settings: Which model, how many experts, and on what text.

    Returns:
        What the result file holds: the clusters, perplexity on held-out text before and after with intervals, their
        ratio with its verdict, parameters, scores by document, the command and the versions.

    Raises:
        SymphonyError: If the model is not one that can be merged, or the output exists.

    Source: HC-SMoE (arXiv 2410.08589) for `outputs`: average linkage of the Euclidean distances of mean outputs over
    all calibration tokens, merged by frequency. Deviation: the router's rows are merged, too, as stock checkpoints need
    one for each expert. Clustering by the graph is ours.
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
    """By load; evenly where none of the cluster was ever chosen."""
    load = statistics.load[cluster]
    shares = load / load.sum() if load.sum() > 0 else torch.full_like(load, 1 / len(cluster))
    return NewExpert(tuple(cluster), tuple(shares.tolist()))
