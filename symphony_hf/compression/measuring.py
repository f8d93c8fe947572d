"""The text, and what a model makes of it before and after."""

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._version import __version__
from ..anatomy import count_parts
from ..compat import transformers_version
from ..data import document_windows, load_corpus, pack_blocks
from ..data.rows import thinned
from ..errors import DataError
from ..evaluation import (
    MIN_DOCUMENTS,
    DocumentScores,
    compare_perplexity,
    perplexity_interval,
    score_documents,
)
from .opening import Opened
from .settings import TextSettings


@dataclass(frozen=True)
class Texts:
    """What is calibrated on, and what is evaluated on.

    Attributes:
        source: What was read.
        calibration_NT: Token ids of the train split; empty where none are needed. Shape: (blocks, block size).
        windows: Token ids of the test split, by document.
    """

    source: str
    calibration_NT: Tensor
    windows: Mapping[str, list[Tensor]]


def read_texts(opened: Opened, settings: TextSettings, calibration_tokens: int = 0) -> Texts:
    """Read and tokenize.

    Args:
        opened: The model.
        settings: Which text.
        calibration_tokens: Of the train split, in blocks drawn at random.

    Raises:
        DataError: If there is no such text, or too little.
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
    return Texts(corpus.source, calibration_NT, usable)


def score(model: PreTrainedModel, texts: Texts, settings: TextSettings, what: str) -> DocumentScores:
    """The likelihood of each test document."""
    return score_documents(model, texts.windows, batch_size=settings.batch_size, progress=f"Scoring, {what}")


def level(scores: DocumentScores, settings: TextSettings) -> dict[str, Any]:
    """A model's perplexity, with its interval."""
    return dataclasses.asdict(perplexity_interval(scores, seed=settings.seed))


def ratio(after: DocumentScores, before: DocumentScores, seed: int) -> dict[str, Any]:
    """Perplexity of one model over that of another, paired by document, with interval and verdict."""
    interval = compare_perplexity(after, before, seed=seed).exp()
    return dataclasses.asdict(interval) | {"verdict": interval.verdict()}


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexity of one smaller model over that of another, of two result files, paired by document.

    Raises:
        EvaluationError: If they were measured on different documents.
    """
    scores = [
        DocumentScores(kept["names"], np.array(kept["nll"]), np.array(kept["num_tokens"]))
        for kept in (a["documents"]["after"], b["documents"]["after"])
    ]
    return ratio(scores[0], scores[1], a["settings"]["seed"])


def parameters(model: PreTrainedModel) -> dict[str, int | None]:
    """All, and those that one token uses."""
    parts = count_parts(model)
    active = [part.active for part in parts]
    known = [number for number in active if number is not None]
    return {"total": sum(part.total for part in parts), "active": sum(known) if len(known) == len(active) else None}


def circumstances(opened: Opened, texts: Texts, settings: TextSettings) -> dict[str, Any]:
    """What every result file has: the command, the text, the versions."""
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
        "versions": {
            "symphony_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers_version(),
            "python": platform.python_version(),
        },
    }


def by_document(scores: DocumentScores) -> dict[str, list[Any]]:
    """Scores as a result file keeps them, so that results can be compared in pairs."""
    return {"names": scores.names, "nll": scores.nll.tolist(), "num_tokens": scores.num_tokens.tolist()}
