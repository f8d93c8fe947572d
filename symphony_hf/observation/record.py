"""Run a model over a form of the text, and keep what was routed for the documents' own tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import cka_matrix
from ..errors import UnsupportedModelError
from ..evaluation import DocumentScores, RoutingRecord, record_routing, score_documents
from ..evaluation.batching import evaluating, flatten, padded_batches
from ..watching import first_expert_dropped, sampling_experts
from .texts import Form


def record_form(model: Any, form: Form, batch_size: int, progress: str) -> dict[str, RoutingRecord]:
    """What each router decided about the documents' tokens, without those that are given in front of windows."""
    recorded = record_routing(model, form.windows, batch_size, progress=progress)
    kept = torch.from_numpy(form.kept_rows())
    return {name: RoutingRecord(*(part[kept] for part in record)) for name, record in recorded.items()}


def score_with_and_without_first(model: Any, form: Form, batch_size: int) -> tuple[DocumentScores, DocumentScores]:
    """Likelihoods of the documents, and those without each token's first expert.

    Raises:
        UnsupportedModelError: If the model does not predict the next token, or a router cannot do without.
    """
    _check_predicts(model)
    with first_expert_dropped(model):
        without = score_documents(model, form.windows, batch_size=batch_size, progress="Without the first expert")
    return score_documents(model, form.windows, batch_size=batch_size, progress="Scoring"), without


def _check_predicts(model: Any) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or head is None or head.weight.shape[0] < vocabulary:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not predict the next token, so there is no loss to compare"
        )


def expert_similarities(model: Any, form: Form, num_tokens: int, batch_size: int) -> dict[str, Tensor]:
    """How alike the experts of each layer are, on some tokens spread over the text.

    Returns:
        By router, the linear CKA of each pair of experts, without bias. Shape of each: (num_experts, num_experts).

    Raises:
        UnsupportedModelError: If the experts of a layer cannot be run one by one.
    """
    flat, _ = flatten(form.windows)
    longest = max(len(window) for window in flat)
    spread = flat[:: max(1, len(flat) // max(batch_size, -(-num_tokens // longest)))]
    similarities = {}
    with evaluating(model) as device:
        (batch,) = padded_batches(spread, len(spread), device, None)
        rows = batch.attention_mask.flatten().nonzero().flatten().cpu()
        places = rows[torch.linspace(0, len(rows) - 1, min(num_tokens, len(rows))).long()]
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = batch.input_ids
        with sampling_experts(model, places) as samples:
            model(**inputs)
        for sample in samples:
            if sample.hidden_TD is not None:
                similarities[sample.name] = cka_matrix(sample.outputs())
    return similarities


@contextmanager
def or_why_not(unavailable: dict[str, str], name: str) -> Iterator[None]:
    """Have what a model cannot be measured on noted with its reason, and go on without."""
    try:
        yield
    except UnsupportedModelError as error:
        unavailable[name] = str(error)
