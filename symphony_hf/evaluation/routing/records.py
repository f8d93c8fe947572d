"""Routing decisions of a model on a text, and their stability when the text is attacked."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from symphony_hf.data.rows import thinned
from symphony_hf.diagnostics.routing_metrics import cka_matrix, flip_rate, router_margin
from symphony_hf.errors import EvaluationError, UnsupportedModelError
from symphony_hf.evaluation.batching import Windows, evaluating, flatten, padded_batches
from symphony_hf.evaluation.perplexity import DocumentScores, TokenScores, score_documents
from symphony_hf.evaluation.windows import aligned_positions

from .drop_first_expert import first_expert_dropped
from .expert_outputs import sampling_experts
from .hooks import Routed, watching_routers
from .texts import Form


@dataclass(frozen=True, eq=False)
class RoutingStability:
    """Share of selections that an attack leaves unchanged, over the tokens that it leaves alone."""

    share: float
    """Mean over layers, in [0, 1]; K / E for random selection."""
    per_layer: np.ndarray
    """Share of each MoE layer. Shape: (layers,)."""
    num_tokens: int
    """Number of compared tokens."""


class RoutingRecord(NamedTuple):
    """Decisions of one router for every token.

    Attributes:
        indices_TK: Selected experts, sorted within a token, int16.
        margin_T: Margins in nats, see `diagnostics.routing_metrics.router_margin`, float32.
    """

    indices_TK: Tensor
    margin_T: Tensor


def record_routing(
    model: nn.Module,
    windows: Windows,
    batch_size: int = 16,
    *,
    progress: str | None = None,
    scores: TokenScores | None = None,
) -> dict[str, RoutingRecord]:
    """Record the decisions of every router of a model for every token.

    Decisions are read from each router's output (`hooks.watching_routers`), so they do not depend on recorded router
    logits, and are correct for families that select with a bias or in groups.

    Args:
        model: A model that discovery supports, symphonized or not, that takes `input_ids` and `attention_mask`. An
            encoder-decoder gets the same text in both.
        windows: Token ids by document name, in windows without overlap. Shape of each: (2 to block_size,), int64.
        batch_size: Number of windows per forward pass.
        progress: Label of the progress bar; no bar when None.
        scores: Takes the likelihoods of these windows, too. Without it, the model's head is spared.

    Returns:
        Decisions by router, in module order, for all tokens of all documents in order. They are on the CPU and take
        2 * K + 4 bytes per token and layer. Routers that did not run, such as those for images, are left out; a layer
        that runs more than once has an entry for each pass.

    Raises:
        EvaluationError: If no router ran, or one did not see every token once; with `scores`, if these are of other
            windows, or a likelihood is not finite.
        UnsupportedModelError: If none of its routers is known.
    """
    if scores is not None and scores.windows is not windows:
        raise EvaluationError("record_routing: `scores` are of other windows")
    flat = flatten(windows)[0] if scores is None else scores.flat
    by_window: list[dict[str, RoutingRecord]] = [{} for _ in flat]
    with evaluating(model) as device, watching_routers(model) as seen:
        for batch in padded_batches(flat, batch_size, device, progress):
            # The outputs, with a cache and logits, must not live on through the next forward.
            if scores is None:
                _run(model, batch.input_ids, batch.attention_mask)
            else:
                scores.add(batch, _run(model, batch.input_ids, batch.attention_mask, all_logits=True).logits)
            for name, routed in _taken(seen):
                record = _recorded(name, routed, batch.input_ids)
                for row, index in enumerate(batch.indices):
                    length = len(flat[index])
                    by_window[index][name] = RoutingRecord(*(part[row, :length] for part in record))
    names = list(by_window[0])
    if not names:
        raise EvaluationError(f"{type(model).__name__}: none of its {len(seen)} routers ran on text alone")
    return {
        name: RoutingRecord(*(torch.cat(parts) for parts in zip(*(w[name] for w in by_window), strict=True)))
        for name in names
    }


def _run(model: Any, input_ids: Tensor, attention_mask: Tensor, *, all_logits: bool = False) -> Any:
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = input_ids
    if not all_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # the LM head is much of a small model's work, and no router waits for it
    return model(**inputs)


def _taken(seen: dict[str, list[Routed]]) -> list[tuple[str, Routed]]:
    """Take the routers' decisions of this forward pass by record name, and empty their lists."""
    taken = []
    for name, calls in seen.items():
        taken += [
            (name if position == 0 else f"{name} (pass {position + 1})", routed)
            for position, routed in enumerate(calls)
        ]
        calls.clear()
    return taken


def _recorded(name: str, routed: Routed, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return selections, shape (windows, length, top_k), and margins, shape (windows, length), on the CPU."""
    logits_TE, indices_TK = routed
    if len(indices_TK) != input_ids.numel():
        raise EvaluationError(
            f"router `{name}` saw {len(indices_TK)} tokens, the batch has {input_ids.numel()}: only routers that see "
            "every token can be compared token by token. Pass the part of the model that takes token ids, such as "
            "`model.language_model` of a vision-language model"
        )
    chosen = indices_TK.sort(-1).values.to(device="cpu", dtype=torch.int16)
    margin_T = router_margin(logits_TE, indices_TK).cpu()
    return chosen.view(*input_ids.shape, -1), margin_T.view(input_ids.shape)


def _untouched_tokens(clean: Windows, attacked: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of untouched tokens among all tokens of the clean and of the attacked documents."""
    positions: list[tuple[np.ndarray, np.ndarray]] = []
    clean_start, attacked_start = 0, 0
    for name in clean:
        clean_ids = torch.cat(list(clean[name])).tolist()
        attacked_ids = torch.cat(list(attacked[name])).tolist()
        clean_T, attacked_T = aligned_positions(clean_ids, attacked_ids)
        positions.append((clean_start + clean_T, attacked_start + attacked_T))
        clean_start += len(clean_ids)
        attacked_start += len(attacked_ids)
    clean_parts, attacked_parts = zip(*positions, strict=True)
    return np.concatenate(clean_parts), np.concatenate(attacked_parts)


def routing_stability(
    model: nn.Module,
    clean_windows: Windows,
    attacked_windows: Windows,
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> RoutingStability:
    """Compare the experts of untouched tokens in clean documents and in their attacked versions, of the same names.

    Whole documents are aligned, so their windows may be cut at different words. Tokens near a cut then have another
    context, alike for every model, so compare models on the same windows. The stability is exactly 1 for identical
    documents. `progress` is the label of the progress bars, before "clean" and "attacked"; no bars when None.

    Raises:
        EvaluationError: If the documents differ by name or have no token in common.
    """
    if clean_windows.keys() != attacked_windows.keys():
        differing = sorted(clean_windows.keys() ^ attacked_windows.keys())
        raise EvaluationError(f"documents that are only clean or only attacked: {differing[:3]}; each needs both forms")
    attacked_windows = {name: attacked_windows[name] for name in clean_windows}
    for windows in (clean_windows, attacked_windows):
        flatten(windows)  # raises on invalid windows before any work
    clean_T, attacked_T = _untouched_tokens(clean_windows, attacked_windows)
    if not len(clean_T):
        raise EvaluationError("no token is the same in clean and attacked documents: were they tokenized alike?")
    bars = [None if progress is None else f"{progress}, {text}" for text in ("clean", "attacked")]
    clean = record_routing(model, clean_windows, batch_size, progress=bars[0])
    attacked = record_routing(model, attacked_windows, batch_size, progress=bars[1])
    pairs = [(clean[name].indices_TK[clean_T], attacked[name].indices_TK[attacked_T]) for name in clean]
    per_layer = 1.0 - np.array([float(flip_rate(*pair).mean()) for pair in pairs])
    return RoutingStability(float(per_layer.mean()), per_layer, len(clean_T))


def record_form(
    model: Any, form: Form, batch_size: int, progress: str, scores: TokenScores | None = None
) -> dict[str, RoutingRecord]:
    """Record each router's decisions for the documents' tokens, without the given first token of each window.

    `scores`, if given, take the documents' likelihoods, as in `record_routing`.
    """
    recorded = record_routing(model, form.windows, batch_size, progress=progress, scores=scores)
    kept = torch.from_numpy(form.kept_rows())
    return {name: RoutingRecord(*(part[kept] for part in record)) for name, record in recorded.items()}


def score_without_first(model: Any, form: Form, batch_size: int) -> DocumentScores:
    """Score the documents without each token's first expert.

    Raises:
        UnsupportedModelError: If the model does not predict the next token, or a router does not support it.
        EvaluationError: If a likelihood is not finite.
    """
    _check_predicts(model)
    with first_expert_dropped(model):
        return score_documents(model, form.windows, batch_size=batch_size, progress="Without the first expert")


def _check_predicts(model: Any) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or head is None or head.weight.shape[0] < vocabulary:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not predict the next token, so it has no loss to compare"
        )


def expert_similarities(model: Any, form: Form, num_tokens: int) -> dict[str, Tensor]:
    """Compute the similarity of the experts of each layer on tokens spread over the text.

    Returns:
        Unbiased linear CKA of each pair of experts, by router. Shape of each: (num_experts, num_experts).

    Raises:
        UnsupportedModelError: If the experts of a layer cannot be run one by one.
    """
    spread = _spread(flatten(form.windows)[0], num_tokens)
    similarities = {}
    with evaluating(model) as device:
        (batch,) = padded_batches(spread, len(spread), device, None)
        own = batch.attention_mask.clone()
        own[:, 0] = 0  # a window's first token is given, and an outlier that attention rests on
        rows = own.flatten().nonzero().flatten().cpu()
        positions = rows[torch.linspace(0, len(rows) - 1, min(num_tokens, len(rows))).long()]
        with sampling_experts(model, positions) as samples:
            _run(model, batch.input_ids, batch.attention_mask)
        for sample in samples:
            if sample.hidden_TD is not None:
                similarities[sample.name] = cka_matrix(sample.outputs())
    return similarities


_MIN_WINDOWS = 8
"""Minimum number of windows that tokens are sampled from, so that they come from several documents."""


def _spread(flat: list[Tensor], num_tokens: int) -> list[Tensor]:
    """Return evenly spaced windows with at least `num_tokens` tokens besides their given first ones, or all windows."""
    number = _MIN_WINDOWS
    while sum(len(window) - 1 for window in thinned(flat, number)) < num_tokens and number < len(flat):
        number *= 2
    return list(thinned(flat, number))


@contextmanager
def or_why_not(unavailable: dict[str, str], name: str) -> Iterator[None]:
    """Record the reason if a measurement is not supported, and continue."""
    try:
        yield
    except UnsupportedModelError as error:
        unavailable[name] = str(error)
