"""Perplexity and routing of a trained model on clean and attacked test text."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.diagnostics.routing_metrics import flip_rate, load_of_choices, normalized_entropy
from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.clean_attacked import WORD_SWAP, measure_forms, perplexity_levels

from .text import StudyText

_ROWS = 32


class Reading(NamedTuple):
    """A model's predictions and routing on a stream of tokens in rows.

    Attributes:
        nll: Negative log-likelihood of each token, in nats; 0 for the first token of a row. Shape: (tokens,).
        chosen: Experts, sorted. Shape: (layers, tokens, top_k).
        predicted: Whether each token is predicted, as all but the first of a row are. Shape: (tokens,).
    """

    nll: Tensor
    chosen: Tensor
    predicted: Tensor

    @property
    def perplexity(self) -> float:
        """Perplexity of all predicted tokens."""
        return self.perplexity_of(self.predicted)

    def perplexity_of(self, which_N: Tensor) -> float:
        """Compute the perplexity of some predicted tokens."""
        return math.exp(float(self.nll[which_N & self.predicted].mean()))


@torch.inference_mode()
def read_stream(model: PreTrainedModel, stream_N: Tensor, block_size: int) -> Reading:
    """Read a stream in rows without shared context, the last one shorter.

    Raises:
        EvaluationError: If a negative log-likelihood is not finite.
    """
    model.eval()
    top_k = int(model.config.num_experts_per_tok)  # type: ignore[union-attr]
    whole = len(stream_N) // block_size * block_size
    batches = list(stream_N[:whole].view(-1, block_size).split(_ROWS))
    if whole < len(stream_N):
        batches.append(stream_N[None, whole:])
    nll, chosen = [], []
    for ids in batches:
        output = model.model(input_ids=ids, output_router_logits=True)
        following = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        values = model.lm_head(output.last_hidden_state, following, reduction="none")
        nll.append(nn.functional.pad(values[:, :-1], (1, 0)).flatten())
        chosen.append(torch.stack([logits.topk(top_k).indices.sort(-1).values for logits in output.router_logits]))
    predicted = torch.arange(len(stream_N)) % block_size > 0
    reading = Reading(torch.cat(nll).double(), torch.cat(chosen, dim=1), predicted)
    if not torch.isfinite(reading.nll).all():
        raise EvaluationError("the negative log-likelihood of a token is not finite: the training diverged")
    return reading


def measure(model: PreTrainedModel, text: StudyText, block_size: int) -> dict[str, Any]:
    """Measure perplexities of validation, clean and attacked test text, and the routing under attack.

    Returns:
        `validation`, `clean`, `attacked`: perplexities, each of its own words, as in the paper. `ratio`: attacked over
        clean. `untouched_clean`, `untouched_attacked`: perplexities of the words that the attack leaves alone, in the
        clean and in the attacked text. `routing_kept`: share of their experts that untouched words still choose under
        attack, over those with an attacked word before them in their row; others cannot change. `load_entropy`:
        normalized entropy of the experts' load on the clean test text, 1 for an even load, as a mean over layers; a
        router that uses few experts keeps its choices more easily.
    """
    validation = read_stream(model, text.validation, block_size)
    streams = {None: text.test, WORD_SWAP: text.attacked}
    measured = measure_forms(lambda form: read_stream(model, streams[form], block_size), [WORD_SWAP])
    clean, attacked = measured.clean, measured.attacked[WORD_SWAP]
    untouched = text.test == text.attacked
    reached = untouched & _behind_an_attack(~untouched, block_size)
    if not reached.any():
        raise EvaluationError("no word has an attacked one before it in its row: raise the attack's rate")
    return {
        "validation": validation.perplexity,
        **perplexity_levels(measured),
        "untouched_clean": clean.perplexity_of(untouched),
        "untouched_attacked": attacked.perplexity_of(untouched),
        "routing_kept": 1.0 - float(flip_rate(clean.chosen[:, reached], attacked.chosen[:, reached]).mean()),
        "load_entropy": _load_entropy(clean.chosen, int(model.config.num_experts)),  # type: ignore[union-attr]
        "test_tokens": int(clean.predicted.sum()),
        "attacked_tokens": int((clean.predicted & ~untouched).sum()),
        "reached_tokens": int(reached.sum()),
    }


def _behind_an_attack(attacked_N: Tensor, block_size: int) -> Tensor:
    """Whether a word of the same row, before this one, was attacked. Shape: (tokens,)."""
    rows = nn.functional.pad(attacked_N, (0, -len(attacked_N) % block_size)).view(-1, block_size).int()
    return (rows.cumsum(1) - rows > 0).flatten()[: len(attacked_N)]


def _load_entropy(chosen_LTK: Tensor, num_experts: int) -> float:
    entropies = [normalized_entropy(load_of_choices(chosen_TK, num_experts)) for chosen_TK in chosen_LTK]
    return sum(entropies) / len(entropies)
