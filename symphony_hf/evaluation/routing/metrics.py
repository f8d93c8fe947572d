"""Routing metrics of each layer, on clean and attacked text and by checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symphony_hf.diagnostics.graph_metrics import (
    centrality,
    communities,
    drift,
    modularity,
    off_diagonal_mass,
    spectral_gap,
)
from symphony_hf.diagnostics.routing_metrics import (
    dead_experts,
    domain_allocation,
    domain_information,
    flip_rate,
    load_of_choices,
    normalized_entropy,
    router_saturation,
)
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS, of_sums, paired_bootstrap
from symphony_hf.routing.graph import count_coselections

from .records import RoutingRecord
from .texts import CLASS_NAMES, DISTANCE_NAMES, AttackedForm, ObservedTexts

_QUANTILES = (0.1, 0.5, 0.9)


def coselection_graph(record: RoutingRecord, num_experts: int) -> Tensor:
    """Compute the co-selection graph of the tokens of a text. Shape: (num_experts, num_experts)."""
    return count_coselections(record.indices_TK, num_experts) / len(record.indices_TK)


def measure_layer(record: RoutingRecord, num_experts: int, texts: ObservedTexts) -> dict[str, Any]:
    """Measure one router on clean text.

    Returns:
        `num_experts`, `top_k`; `load` (shares that sum to 1), `load_entropy`, `dead_experts` (indices), `busiest`
        (highest load over the even load); `margin` in nats (`mean`, `p10`, `p50`, `p90`, `not_by_logits`: the share of
        tokens whose selection is not the highest logits); `allocation` by domain, `domain_information`;
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
    """Return `neighbours`, `spectral_gap`, `modularity`, `communities` and `centrality` of one graph."""
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
    """Return means over the layers of a model."""
    own = list(layers.values())
    means = {name: float(np.mean([layer[name] for layer in own])) for name in _MEANS}
    graphs = {name: float(np.mean([layer["graph"][name] for layer in own])) for name in _GRAPH_MEANS}
    dead = sum(len(layer["dead_experts"]) for layer in own) / sum(layer["num_experts"] for layer in own)
    margins = [layer["margin"]["p50"] for layer in own if layer["margin"]]
    return {**means, **graphs, "dead_experts": dead, "margin": float(np.mean(margins)) if margins else 0.0}


_MEANS = ("load_entropy", "busiest", "domain_information")
_GRAPH_MEANS = ("neighbours", "spectral_gap", "modularity")


Records = Mapping[str, RoutingRecord]


def compare_attacked(
    case: AttackCase, form: AttackedForm, clean: Records, attacked: Records, texts: ObservedTexts
) -> dict[str, Any]:
    """Compare the routing of untouched tokens on clean and attacked text.

    Returns:
        `attack`, `severity`, `seed`, `tokens`; `change_rate`: the flip rate over all layers, with its interval over
        documents, None if fewer than 10 have tokens; `per_layer`: the flip rate by router; `flips_per_layer`: the share
        of tokens with any changed expert, by router; `by_distance` and `by_class`: the flip rate by router and distance
        from the last edit, or class of token. Rates are None where there are no tokens.
    """
    changed = {}
    for name, record in clean.items():
        before_TK, after_TK = record.indices_TK[form.clean], attacked[name].indices_TK[form.attacked]
        changed[name] = flip_rate(before_TK, after_TK).numpy()
    return {
        "attack": case.attack,
        "severity": case.severity,
        "seed": case.seed,
        "tokens": len(form.clean),
        "change_rate": _interval(np.mean(list(changed.values()), axis=0), form.document, len(form.form.num_tokens)),
        "per_layer": {name: _mean(values) for name, values in changed.items()},
        "flips_per_layer": {name: _mean(values > 0) for name, values in changed.items()},
        "by_distance": _means(changed, form.distance, DISTANCE_NAMES),
        "by_class": _means(changed, texts.token_class[form.clean], CLASS_NAMES),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _interval(change_T: np.ndarray, document: np.ndarray, num_documents: int) -> dict[str, Any] | None:
    """Return the interval of the mean over tokens, resampled by document; None if too few documents have any."""
    number = np.bincount(document, minlength=num_documents)
    total = np.bincount(document, weights=change_T, minlength=num_documents)
    kept = number > 0
    if kept.sum() < MIN_DOCUMENTS:
        return None
    mean = of_sums(lambda totals, numbers: totals / numbers)
    return dataclasses.asdict(paired_bootstrap([total[kept], number[kept]], mean, null=None, weights=number[kept]))


def _means(changed: Mapping[str, np.ndarray], kind: np.ndarray, names: Sequence[str]) -> dict[str, list[float | None]]:
    masks = [kind == number for number in range(len(names))]
    return {router: [_mean(values[mask]) for mask in masks] for router, values in changed.items()}


def compare_checkpoint(
    source: str, records: Records, final: Records, graphs: Mapping[str, Tensor], learned: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Compare a checkpoint with the last one on the same text.

    Args:
        source: The checkpoint.
        records: Decisions of its routers.
        final: Decisions of the last checkpoint's routers.
        graphs: Co-selection graph of each router of the last checkpoint.
        learned: Learned graphs of the checkpoint; empty if it has none.

    Returns:
        `source`, `symphonized`, and by router: `saturation` (share of selections that match the last checkpoint's),
        `load`, `load_entropy`, and `drift` of the co-selection graph to that of the last checkpoint.
    """
    own = {name: coselection_graph(record, len(graphs[name])) for name, record in records.items()}
    loads = {name: load_of_choices(record.indices_TK, len(graphs[name])) for name, record in records.items()}
    return {
        "source": source,
        "symphonized": bool(learned),
        "saturation": {n: router_saturation(r.indices_TK, final[n].indices_TK) for n, r in records.items()},
        "load": {name: load_E.tolist() for name, load_E in loads.items()},
        "load_entropy": {name: normalized_entropy(load_E) for name, load_E in loads.items()},
        "drift": {name: drift(graph_EE, torch.as_tensor(graphs[name])) for name, graph_EE in own.items()},
    }
