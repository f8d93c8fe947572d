"""The numbers of one model on clean text, layer by layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diagnostics import (
    centrality,
    communities,
    dead_experts,
    domain_allocation,
    domain_information,
    load_of_choices,
    modularity,
    normalized_entropy,
    off_diagonal_mass,
    spectral_gap,
)
from ..evaluation import RoutingRecord
from ..routing import count_coselections
from .texts import CLASS_NAMES, ObservedTexts

_QUANTILES = (0.1, 0.5, 0.9)


def coselection_graph(record: RoutingRecord, num_experts: int) -> Tensor:
    """Which experts a text has chosen together: the social graph of its tokens. Shape: (num_experts, num_experts)."""
    return count_coselections(record.indices_TK, num_experts) / len(record.indices_TK)


def measure_layer(record: RoutingRecord, num_experts: int, texts: ObservedTexts) -> dict[str, Any]:
    """One router on clean text.

    Args:
        record: What it decided.
        num_experts: E.
        texts: What it ran on.

    Returns:
        `num_experts`, `top_k`; `load` (shares that sum to 1), `load_entropy`, `dead_experts` (numbers), `busiest` (the
        highest load over the even one); `margin` in nats (`mean`, `p10`, `p50`, `p90`, `not_by_logits`: the share of
        tokens whose choice the logits alone would not have made); `allocation` by domain, `domain_information`;
        `margin_by_class`; `graph`: see `measure_graph`.
    """
    load_E = load_of_choices(record.indices_TK, num_experts)
    by_domain = [record.indices_TK[texts.domain == number] for number in range(len(texts.domains))]
    allocation_DE = domain_allocation(by_domain, num_experts)
    return {
        "num_experts": num_experts,
        "top_k": record.indices_TK.shape[1],
        "load": load_E.tolist(),
        "load_entropy": normalized_entropy(load_E),
        "dead_experts": dead_experts(load_E),
        "busiest": float(load_E.max()) * num_experts,
        "margin": _margins(record.margin_T),
        "margin_by_class": _by_class(record.margin_T, texts.token_class),
        "allocation": dict(zip(texts.domains, allocation_DE.tolist(), strict=True)),
        "domain_information": domain_information(allocation_DE),
        "graph": measure_graph(coselection_graph(record, num_experts)),
    }


def measure_graph(adjacency_EE: Tensor) -> dict[str, Any]:
    """`neighbours`, `spectral_gap`, `modularity`, `communities` and `centrality` of one graph."""
    groups = communities(adjacency_EE)
    return {
        "neighbours": off_diagonal_mass(adjacency_EE),
        "spectral_gap": spectral_gap(adjacency_EE),
        "modularity": modularity(adjacency_EE, groups),
        "communities": groups,
        "centrality": centrality(adjacency_EE).tolist(),
    }


def _margins(margin_T: Tensor) -> dict[str, float]:
    finite_T = margin_T[torch.isfinite(margin_T)].double().numpy()
    if not finite_T.size:
        return {}
    quantiles = np.quantile(finite_T, _QUANTILES)
    values = {f"p{round(100 * q)}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": float(finite_T.mean()), **values, "not_by_logits": float((finite_T < 0).mean())}


def _by_class(margin_T: Tensor, token_class: np.ndarray) -> dict[str, float | None]:
    medians: dict[str, float | None] = {}
    for number, name in enumerate(CLASS_NAMES):
        own = margin_T.numpy()[token_class == number]
        medians[name] = float(np.median(own)) if own.size and np.isfinite(np.median(own)) else None
    return medians


def mean_over_layers(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers that a table shows of a whole model."""
    own = list(layers.values())
    means = {name: float(np.mean([layer[name] for layer in own])) for name in _MEANS}
    graphs = {name: float(np.mean([layer["graph"][name] for layer in own])) for name in _GRAPH_MEANS}
    dead = sum(len(layer["dead_experts"]) for layer in own) / sum(layer["num_experts"] for layer in own)
    margins = [layer["margin"]["p50"] for layer in own if layer["margin"]]
    return {**means, **graphs, "dead_experts": dead, "margin": float(np.mean(margins)) if margins else 0.0}


_MEANS = ("load_entropy", "busiest", "domain_information")
_GRAPH_MEANS = ("neighbours", "spectral_gap", "modularity")
