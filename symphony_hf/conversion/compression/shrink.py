"""Steps common to merging and pruning: open, calibrate, score, shrink, write, score again."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from symphony_hf.compat import versions
from symphony_hf.conversion.inspection.counts import count_parts
from symphony_hf.conversion.upcycling.target import writing
from symphony_hf.data.blocks import document_windows, pack_blocks
from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.rows import thinned
from symphony_hf.errors import DataError
from symphony_hf.evaluation.checkpoint import ModelUnderTest
from symphony_hf.evaluation.comparison import compare_perplexity, perplexity_interval
from symphony_hf.evaluation.perplexity import DocumentScores, score_documents
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS
from symphony_hf.files import write_json

from .calibration import ExpertStatistics, calibrate
from .layers import Opened, check_number, open_model
from .rebuild import NewExpert, with_fewer_experts
from .settings import FewerExpertsSettings, TextSettings


@dataclass(frozen=True)
class CalibrationAndTest:
    """Text for calibration and evaluation.

    Attributes:
        source: Description of the source.
        calibration_NT: Token ids of the train split, possibly empty. Shape: (blocks, block size).
        windows: Token ids of the test split, by document.
    """

    source: str
    calibration_NT: Tensor
    windows: Mapping[str, list[Tensor]]


def read_texts(opened: Opened, settings: TextSettings, calibration_tokens: int = 0) -> CalibrationAndTest:
    """Read and tokenize the text.

    Args:
        opened: Model.
        settings: Text and its sizes.
        calibration_tokens: Number of tokens of the train split, in random blocks.

    Raises:
        DataError: If the text is missing or too short.
    """
    corpus = load_corpus(settings.data, text_column=settings.text_column)
    calibration_NT = torch.empty(0, opened.block_size, dtype=torch.int64)
    if calibration_tokens:
        blocks_NT = pack_blocks(corpus.train, opened.tokenizer, opened.block_size)
        order = torch.randperm(len(blocks_NT), generator=torch.Generator().manual_seed(settings.seed))
        calibration_NT = blocks_NT[order[: max(1, calibration_tokens // opened.block_size)]]
    documents = thinned(corpus.test, settings.documents)
    windows = document_windows(documents, opened.tokenizer, opened.block_size)
    usable = {document.name: own for document, own in zip(documents, windows, strict=True) if own}
    if len(usable) < MIN_DOCUMENTS:
        raise DataError(
            f"{corpus.source}: {len(usable)} documents in the test split to evaluate on; intervals need "
            f"{MIN_DOCUMENTS}: give more text, or raise --documents"
        )
    return CalibrationAndTest(corpus.source, calibration_NT, usable)


def score(model: PreTrainedModel, texts: CalibrationAndTest, settings: TextSettings, what: str) -> DocumentScores:
    """Return the likelihood of each test document."""
    return score_documents(model, texts.windows, batch_size=settings.batch_size, progress=f"Scoring, {what}")


def level(scores: DocumentScores, settings: TextSettings) -> dict[str, Any]:
    """Return a model's perplexity with its interval."""
    return dataclasses.asdict(perplexity_interval(scores, seed=settings.seed))


def ratio(after: DocumentScores, before: DocumentScores, seed: int) -> dict[str, Any]:
    """Return the ratio of two models' perplexities, paired by document, with interval and verdict."""
    interval = compare_perplexity(after, before, seed=seed).exp()
    return dataclasses.asdict(interval) | {"verdict": interval.verdict()}


def parameters(model: PreTrainedModel) -> dict[str, int | None]:
    """Return the number of all parameters, and of those that one token uses."""
    parts = count_parts(model)
    active = [part.active for part in parts]
    known = [number for number in active if number is not None]
    return {"total": sum(part.total for part in parts), "active": sum(known) if len(known) == len(active) else None}


def circumstances(opened: Opened, texts: CalibrationAndTest, settings: TextSettings) -> dict[str, Any]:
    """Return what every result file has: command, settings, text and versions."""
    return {
        "command": settings.command_line(),
        "settings": dataclasses.asdict(settings) | {"block_size": opened.block_size},
        "model_type": opened.model.config.model_type,
        "symphony": bool(opened.graphs),
        "fingerprint": opened.fingerprint,
        "text": {
            "source": texts.source,
            "calibration_tokens": texts.calibration_NT.numel(),
            "documents": len(texts.windows),
        },
        "versions": versions(),
    }


def by_document(scores: DocumentScores) -> dict[str, list[Any]]:
    """Return the scores as stored in result files, for paired comparisons."""
    return {"names": scores.names, "nll": scores.nll.tolist(), "num_tokens": scores.num_tokens.tolist()}


Planner = Callable[[Opened, list[ExpertStatistics]], list[list[NewExpert]]]


def shrink(settings: FewerExpertsSettings, plan: Planner, *, outputs: bool, norms: bool) -> dict[str, Any]:
    """Write a checkpoint with fewer experts, load it with its Auto class, and evaluate it.

    `plan` returns the new experts of each layer; `outputs` and `norms` say whether it needs each expert's mean output
    and the gate-weighted norms. Returns the content of the result file.
    """
    started = time.perf_counter()
    target = settings.check_output()
    assert target is not None
    smaller, tokenizer, texts, before, result = _shrink(settings, plan, outputs, norms)  # frees the old model
    with writing(target, settings.command) as folder:
        smaller.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = ModelUnderTest(str(folder), None, "auto").model
        after = score(loaded, texts, settings, "after")
        result["parameters"]["after"] = parameters(loaded)
        result["perplexity"]["after"] = level(after, settings)
        result["perplexity"]["ratio"] = ratio(after, before, settings.seed)
        result["documents"]["after"] = by_document(after)
        result["seconds"] = time.perf_counter() - started
        write_json(settings.result_file(target, folder), result)
    return result


def _shrink(
    settings: FewerExpertsSettings, plan: Planner, outputs: bool, norms: bool
) -> tuple[PreTrainedModel, Any, CalibrationAndTest, DocumentScores, dict[str, Any]]:
    opened = open_model(settings)
    check_number(opened.layers, settings.experts, settings.command)
    texts = read_texts(opened, settings, settings.calibration_tokens)
    calibration, batch_size = texts.calibration_NT, settings.batch_size
    seen = calibrate(opened.model, opened.layers, calibration, batch_size=batch_size, outputs=outputs, norms=norms)
    new_experts = plan(opened, seen)
    before = score(opened.model, texts, settings, "before")
    layer = opened.layers[0]
    result = circumstances(opened, texts, settings) | {
        "experts": {"before": layer.num_experts, "after": settings.experts, "top_k": layer.top_k},
        "made_of": {
            layer.router.name: [list(new.members) for new in own]
            for layer, own in zip(opened.layers, new_experts, strict=True)
        },
        "load_kept": [_load_kept(own, statistics) for own, statistics in zip(new_experts, seen, strict=True)],
        "parameters": {"before": parameters(opened.model)},
        "perplexity": {"before": level(before, settings)},
        "documents": {"before": by_document(before)},
    }
    smaller = with_fewer_experts(opened.model, opened.layers, new_experts)
    return smaller, opened.tokenizer, texts, before, result


def _load_kept(new_experts: list[NewExpert], statistics: ExpertStatistics) -> float:
    """Return the share of selections on the calibration text whose expert is part of a new one."""
    members = [member for new in new_experts for member in new.members]
    return float(statistics.load[members].sum() / statistics.load.sum())
