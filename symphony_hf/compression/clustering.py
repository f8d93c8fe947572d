"""Experts in clusters of those that are alike."""

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor


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
