"""What changes in a model's routing: under attack on the text, and from checkpoint to checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diagnostics import drift, kept_by_token, load_of_choices, normalized_entropy, router_saturation
from ..evaluation import RoutingRecord, paired_bootstrap
from ..robustness.plan import Cell
from .layers import coselection_graph
from .texts import CLASS_NAMES, DISTANCE_NAMES, AttackedForm, ObservedTexts

Records = Mapping[str, RoutingRecord]


def compare_attacked(
    cell: Cell, form: AttackedForm, clean: Records, attacked: Records, texts: ObservedTexts
) -> dict[str, Any]:
    """The routing of the tokens that an attack left alone, before and after.

    Args:
        cell: The attack.
        form: The attacked text.
        clean: What the routers decided on clean text.
        attacked: Likewise on the attacked.
        texts: Of the tokens' classes.

    Returns:
        `attack`, `severity`, `seed`, `tokens`; `change_rate`: the share of choices that changed, over all layers, with
        its interval over documents; `per_layer`, `flips_per_layer` (tokens whose set of experts changed at all), by
        router; `by_distance` and `by_class`: by router, the change rate behind the last edit, and by kind of token,
        None where there is none.
    """
    changed = {}
    for name, record in clean.items():
        before_TK, after_TK = record.indices_TK[form.clean], attacked[name].indices_TK[form.attacked]
        changed[name] = 1.0 - kept_by_token(before_TK, after_TK).numpy()
    return {
        "attack": cell.attack,
        "severity": cell.severity,
        "seed": cell.seed,
        "tokens": len(form.clean),
        "change_rate": _interval(np.mean(list(changed.values()), axis=0), form.document, len(form.form.num_tokens)),
        "per_layer": {name: float(values.mean()) for name, values in changed.items()},
        "flips_per_layer": {name: float((values > 0).mean()) for name, values in changed.items()},
        "by_distance": _means(changed, form.distance, DISTANCE_NAMES),
        "by_class": _means(changed, texts.token_class[form.clean], CLASS_NAMES),
    }


def _interval(change_T: np.ndarray, document: np.ndarray, num_documents: int) -> dict[str, Any]:
    """Of the mean over tokens, resampled by document. One of which nothing was left alone has no say."""
    number = np.bincount(document, minlength=num_documents)
    total = np.bincount(document, weights=change_T, minlength=num_documents)
    kept = number > 0
    interval = paired_bootstrap(
        [total[kept], number[kept]],
        lambda totals, numbers, axis: totals.sum(axis=axis) / numbers.sum(axis=axis),
        null=None,
        weights=number[kept],
    )
    return dataclasses.asdict(interval)


def _means(changed: Mapping[str, np.ndarray], kind: np.ndarray, names: Sequence[str]) -> dict[str, list[float | None]]:
    masks = [kind == number for number in range(len(names))]
    return {
        router: [float(values[mask].mean()) if mask.any() else None for mask in masks]
        for router, values in changed.items()
    }


def compare_checkpoint(
    source: str, records: Records, final: Records, graphs: Mapping[str, Tensor], learned: Mapping[str, Tensor]
) -> dict[str, Any]:
    """One checkpoint beside the last one, on the same text.

    Args:
        source: The checkpoint.
        records: What its routers decided.
        final: What those of the last one decided.
        graphs: Co-selection graph of each router of the last one. Shape of each: (num_experts, num_experts).
        learned: Its own learned graphs; empty where it has none.

    Returns:
        `source`; by router: `saturation` (the share of choices that are the last one's), `load`, `load_entropy`,
        `drift` of the co-selection graph to the last one's; `symphonized`.
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
