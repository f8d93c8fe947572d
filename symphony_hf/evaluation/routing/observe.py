"""The measurements of `symphony routing`."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from symphony_hf.compat import versions
from symphony_hf.diagnostics.routing_metrics import coactivation
from symphony_hf.evaluation.checkpoint import load_tokenizer
from symphony_hf.evaluation.comparison import compare_perplexity
from symphony_hf.evaluation.perplexity import DocumentScores, TokenScores
from symphony_hf.evaluation.windows import check_context, default_block_size
from symphony_hf.files import replacing, write_json
from symphony_hf.patching.symphonize import expert_graphs, is_symphonized
from symphony_hf.results import check_results, remove_results

from .metrics import (
    compare_attacked,
    compare_checkpoint,
    coselection_graph,
    mean_over_layers,
    measure_graph,
    measure_layer,
)
from .pictures import CAPTIONS, picture_names
from .records import (
    RoutingRecord,
    expert_similarities,
    or_why_not,
    record_form,
    score_without_first,
)
from .settings import RoutedModel, RoutingSettings
from .texts import CLASS_NAMES, DISTANCE_NAMES, ObservedTexts, prepare_observed

RESULT = "result.json"
_KEYS = ("layers", "versions")
"""Keys of its result. That of `symphony eval`, which has the same name, lacks the first."""
MATRICES = "matrices.safetensors"


def observe_routing(settings: RoutingSettings) -> dict[str, Any]:
    """Run a model and its earlier checkpoints on text, and measure their routing.

    Returns:
        The contents of `output/result.json`: `routers` (those that ran, in order), `layers` by router (see
        `measure_layer`; with `learned_graph` and `similarity`), `overall`, `corruption` (see `compare_attacked`),
        `checkpoints` (see `compare_checkpoint`; the last is the model itself), `drop_first`, `unavailable` (unsupported
        measurements with their reasons), `domains`, `documents`, `settings`, `versions`. Matrices are in
        `output/matrices.safetensors`: `coselection/...`, `coactivation/...`, `learned/...`, `similarity/...`, each with
        the router's name, and `checkpoint/<number>/coselection/...`.

    Raises:
        SymphonyError: If a model or the data could not be loaded, the checkpoints are not of one model, or windows are
            longer than the context of one.
    """
    started, output = time.perf_counter(), Path(settings.output)
    check_results(output / RESULT, [MATRICES, *CAPTIONS], "routing", _KEYS)
    checkpoint = RoutedModel(settings.model, settings.revision, settings.dtype)
    earlier = [RoutedModel(source, None, settings.dtype) for source in settings.against]
    for other in earlier:
        checkpoint.check_same_routers(other)
    named = settings.tokenizer or checkpoint.source
    tokenizer = load_tokenizer(named, None if settings.tokenizer else checkpoint.revision)
    block_size = settings.block_size or default_block_size([checkpoint, *earlier])
    for model in (checkpoint, *earlier):
        check_context("routing", "clean text", block_size, block_size, model)
    texts = prepare_observed(settings, tokenizer, block_size)
    checkpoint.check_vocabulary(max(form.highest for form in (texts.clean, *(o.form for o in texts.attacked.values()))))
    if texts.attacked:  # the case that needs the smallest windows of clean text
        case, attacked = max(texts.attacked.items(), key=lambda item: item[1].form.longest)
        check_context("routing", str(case), attacked.form.longest, block_size, checkpoint, under_attack=True)
    observation = _Observation(settings, texts)
    observation.observe(checkpoint)
    for number, other in enumerate(earlier):
        observation.observe_earlier(number, other)
    observation.finish(checkpoint)
    result = observation.result | {
        "documents": {
            "source": texts.source,
            "number": len(texts.clean.num_tokens),
            "words": texts.num_words,
            "tokens": sum(texts.clean.num_tokens),
        },
        "domains": {name: int((texts.domain == number).sum()) for number, name in enumerate(texts.domains)},
        "distances": list(DISTANCE_NAMES),
        "classes": list(CLASS_NAMES),
        "settings": dataclasses.asdict(settings) | {"block_size": block_size},
        "fingerprints": {source.source: source.fingerprint for source in (*earlier, checkpoint)},
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    remove_results(output / RESULT, [MATRICES, *picture_names(output / RESULT)], _KEYS)
    write_json(output / RESULT, result)  # first: it marks the others as ours
    _write_matrices(output / MATRICES, observation.matrices)
    return result


class _Observation:
    """Measurements so far: entries of the result, and matrices, by name."""

    def __init__(self, settings: RoutingSettings, texts: ObservedTexts) -> None:
        self.settings, self.texts = settings, texts
        self.matrices: dict[str, Tensor] = {}
        self.unavailable: dict[str, str] = {}
        self.result: dict[str, Any] = {"checkpoints": [], "unavailable": self.unavailable, "drop_first": None}
        self.clean: dict[str, RoutingRecord] = {}
        self.graphs: dict[str, Tensor] = {}
        self.learned: dict[str, Tensor] = {}

    def observe(self, checkpoint: RoutedModel) -> None:
        """Observe the model: clean, attacked, without first experts, and its experts' similarity."""
        settings, texts = self.settings, self.texts
        without = self._score_without_first(checkpoint)
        scores = None if without is None else TokenScores(texts.clean.windows)
        self.clean = self._record(checkpoint, "clean", scores)
        num_experts = {name: checkpoint.routers[name.partition(" (pass")[0]][0] for name in self.clean}
        self.graphs = {name: coselection_graph(record, num_experts[name]) for name, record in self.clean.items()}
        layers = {name: measure_layer(record, num_experts[name], texts) for name, record in self.clean.items()}
        for name, record in self.clean.items():
            self.matrices[f"coselection/{name}"] = self.graphs[name]
            self.matrices[f"coactivation/{name}"] = coactivation(record.indices_TK, num_experts[name]).float()
        self.result["corruption"] = []
        for case, form in texts.attacked.items():
            attacked = record_form(checkpoint.model, form.form, settings.batch_size, f"Routing of {case}")
            self.result["corruption"].append(compare_attacked(case, form, self.clean, attacked, texts))
        if without is not None and scores is not None:
            self._leave_out_first(without, DocumentScores.of(scores.by_document()))
        self._compare_experts(checkpoint, layers)
        self.learned = learned_graphs(checkpoint)
        for name, layer in layers.items():
            graph = self.learned.get(name.partition(" (pass")[0])
            layer["learned_graph"] = None if graph is None else measure_graph(graph)
        self.matrices |= {f"learned/{name}": graph for name, graph in self.learned.items()}
        self.result["layers"], self.result["overall"] = layers, mean_over_layers(layers)
        self.result["routers"] = list(self.clean)
        self.result["idle_routers"] = [n for n in checkpoint.routers if n not in self.clean]
        checkpoint.release()

    def _record(
        self, checkpoint: RoutedModel, what: str, scores: TokenScores | None = None
    ) -> dict[str, RoutingRecord]:
        progress = f"Routing of {checkpoint.source}, {what}"
        return record_form(checkpoint.model, self.texts.clean, self.settings.batch_size, progress, scores)

    def _score_without_first(self, checkpoint: RoutedModel) -> DocumentScores | None:
        """Score the documents without first experts; None if that is not wanted or not supported."""
        if self.settings.drop_first:
            with or_why_not(self.unavailable, "drop_first"):
                return score_without_first(checkpoint.model, self.texts.clean, self.settings.batch_size)
        return None

    def _leave_out_first(self, without: DocumentScores, whole: DocumentScores) -> None:
        difference = compare_perplexity(without, whole)
        self.result["drop_first"] = {
            "loss": float(whole.nll.sum() / whole.num_tokens.sum()),
            "loss_without": float(without.nll.sum() / without.num_tokens.sum()),
            "difference": dataclasses.asdict(difference),
            "ratio": dataclasses.asdict(difference.exp()),
        }

    def _compare_experts(self, checkpoint: RoutedModel, layers: dict[str, dict[str, Any]]) -> None:
        for layer in layers.values():
            layer["similarity"] = None
        if not self.settings.similarity_tokens:
            return
        with or_why_not(self.unavailable, "similarity"):
            tokens = self.settings.similarity_tokens
            for name, cka_EE in expert_similarities(checkpoint.model, self.texts.clean, tokens).items():
                self.matrices[f"similarity/{name}"] = cka_EE.float()
                others = cka_EE[~torch.eye(len(cka_EE), dtype=torch.bool)]
                layers[name]["similarity"] = {"mean": float(others.mean()), "highest": float(others.max())}

    def observe_earlier(self, number: int, checkpoint: RoutedModel) -> None:
        """Observe an earlier checkpoint on clean text."""
        records = self._record(checkpoint, "clean")
        own = compare_checkpoint(checkpoint.source, records, self.clean, self.graphs, learned_graphs(checkpoint))
        self.result["checkpoints"].append(own)
        self._keep_graphs(number, records)
        checkpoint.release()

    def finish(self, checkpoint: RoutedModel) -> None:
        """Add the model as the last of its checkpoints."""
        if not self.settings.against:
            return
        own = compare_checkpoint(checkpoint.source, self.clean, self.clean, self.graphs, self.learned)
        self.result["checkpoints"].append(own)
        self._keep_graphs(len(self.settings.against), self.clean)

    def _keep_graphs(self, number: int, records: dict[str, RoutingRecord]) -> None:
        for name, record in records.items():
            graph = coselection_graph(record, len(self.graphs[name]))
            self.matrices[f"checkpoint/{number}/coselection/{name}"] = graph


def learned_graphs(checkpoint: RoutedModel) -> dict[str, Tensor]:
    """Return a checkpoint's learned graphs by router, on the CPU; empty if it is not symphonized."""
    if not is_symphonized(checkpoint.model):
        return {}
    return {name: graph.float().cpu() for name, graph in expert_graphs(checkpoint.model).items()}


def _write_matrices(path: Path, matrices: dict[str, Tensor]) -> None:
    with replacing(path) as written:
        written.write_bytes(save({name: matrix.contiguous().clone() for name, matrix in matrices.items()}))
