"""Loss and routing of a trained model on held-out text, clean and attacked."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.diagnostics.routing_metrics import flip_rate, load_of_choices, normalized_entropy
from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.clean_attacked import WORD_SWAP, measure_forms, perplexity_levels

from .damage import reached_tokens
from .text import StudyText

_ROWS = 32


class DivergedError(EvaluationError):
    """The training of a run diverged."""


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
    def loss(self) -> float:
        """Mean negative log-likelihood of all predicted tokens, in nats."""
        return self.loss_of(self.predicted)

    def loss_of(self, which_N: Tensor) -> float:
        """Compute the mean negative log-likelihood of some predicted tokens, in nats."""
        return float(self.nll[which_N & self.predicted].mean())

    @property
    def perplexity(self) -> float:
        """Perplexity of all predicted tokens."""
        return _exp(self.loss)

    def perplexity_of(self, which_N: Tensor) -> float:
        """Compute the perplexity of some predicted tokens."""
        return _exp(self.loss_of(which_N))


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise DivergedError(f"a loss of {loss:.4g} nats has no perplexity: the training diverged") from error


@torch.inference_mode()
def read_stream(model: PreTrainedModel, stream_N: Tensor, block_size: int) -> Reading:
    """Read a stream in rows without shared context, the last one shorter.

    Raises:
        DivergedError: If a negative log-likelihood is not finite.
    """
    model.eval()
    top_k = int(model.config.num_experts_per_tok)  # type: ignore[union-attr]
    whole = len(stream_N) // block_size * block_size
    batches = list(stream_N[:whole].view(-1, block_size).split(_ROWS))
    if whole < len(stream_N):
        batches.append(stream_N[None, whole:])
    nll, chosen = [], []
    with _choices(model) as choices:
        for ids in batches:
            output = model.model(input_ids=ids)
            following = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
            values = model.lm_head(output.last_hidden_state, following, reduction="none")
            nll.append(nn.functional.pad(values[:, :-1], (1, 0)).flatten())
            chosen.append(torch.stack([indices[:, :top_k].sort(-1).values for indices in choices]))
            choices.clear()
    predicted = torch.arange(len(stream_N)) % block_size > 0
    reading = Reading(torch.cat(nll).double(), torch.cat(chosen, dim=1), predicted)
    if not torch.isfinite(reading.nll).all():
        raise DivergedError("the negative log-likelihood of a token is not finite: the training diverged")
    return reading


@contextlib.contextmanager
def _choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the experts that each router selects, layer by layer. Shape of each: (tokens, at least top_k)."""
    choices: list[Tensor] = []
    gates = [layer.moe.gate for layer in model.model.layers if layer.moe is not None]  # type: ignore[union-attr]
    with contextlib.ExitStack() as hooks:
        for gate in gates:
            hooks.enter_context(gate.register_forward_hook(lambda _, __, outputs: choices.append(outputs[2])))
        yield choices


def measure(model: PreTrainedModel, text: StudyText, block_size: int) -> dict[str, Any]:
    """Measure a model on validation, clean and attacked test text, and its routing under attack.

    Returns:
        `validation_loss`: in nats per token. `load_entropy`: normalized entropy of the experts' load on the clean test
        text, 1 for an even load, as a mean over layers; a router that uses few experts keeps its choices more easily.
        For words, the values of `_measure_words`; for characters, those of `_measure_characters`.
    """
    validation = read_stream(model, text.validation, block_size)

    def read(form: str | None) -> Reading:
        return read_stream(model, text.test if form is None else text.attacked[form], block_size)

    readings = measure_forms(read, text.attacked)
    clean = readings.clean
    num_experts = int(model.config.num_experts)  # type: ignore[union-attr]
    values: dict[str, Any] = {
        "validation_loss": validation.loss,
        "load_entropy": _load_entropy(clean.chosen, num_experts),
        "test_tokens": int(clean.predicted.sum()),
    }
    if text.forgotten is not None:
        values["forgotten_nats"] = read_stream(model, text.forgotten, block_size).loss
    if WORD_SWAP not in text.attacked:
        values["clean_nats"] = clean.loss
        for rate, attacked in readings.attacked.items():
            values |= _measure_characters(clean, attacked, text.test == text.attacked[rate], block_size, rate)
        return values
    untouched = text.test == text.attacked[WORD_SWAP]
    return {
        **values,
        "validation": validation.perplexity,
        **perplexity_levels(readings),
        **_measure_words(clean, readings.attacked[WORD_SWAP], untouched, block_size),
    }


def _measure_words(clean: Reading, attacked: Reading, untouched: Tensor, block_size: int) -> dict[str, Any]:
    """Return `untouched_clean` and `untouched_attacked`, and the routing.

    `clean`, `attacked` and `ratio` are perplexities of all words, each of its own, as in the paper. `untouched_clean`
    and `untouched_attacked` are those of the words that the attack leaves alone, in the clean and in the attacked text.
    """
    kept, reached = _routing_kept(clean, attacked, untouched, block_size)
    return {
        "untouched_clean": clean.perplexity_of(untouched),
        "untouched_attacked": attacked.perplexity_of(untouched),
        "routing_kept": kept,
        "attacked_tokens": int((clean.predicted & ~untouched).sum()),
        "reached_tokens": reached,
    }


def _measure_characters(
    clean: Reading, attacked: Reading, untouched: Tensor, block_size: int, rate: str
) -> dict[str, Any]:
    """Return the loss of the characters left alone, in nats, and the routing that they keep, under one damage rate."""
    kept, reached = _routing_kept(clean, attacked, untouched, block_size)
    return {
        f"damaged_nats_{rate}": attacked.loss_of(untouched),
        f"routing_kept_{rate}": kept,
        f"reached_tokens_{rate}": reached,
    }


def _routing_kept(clean: Reading, attacked: Reading, untouched: Tensor, block_size: int) -> tuple[float, int]:
    """Return the share of their experts that untouched tokens still choose under attack, and the number of these.

    Only tokens with an attacked one before them in their row are counted; others cannot change.
    """
    reached = reached_tokens(untouched, block_size)
    kept = 1.0 - float(flip_rate(clean.chosen[:, reached], attacked.chosen[:, reached]).mean())
    return kept, int(reached.sum())


def _load_entropy(chosen_LTK: Tensor, num_experts: int) -> float:
    entropies = [normalized_entropy(load_of_choices(chosen_TK, num_experts)) for chosen_TK in chosen_LTK]
    return sum(entropies) / len(entropies)
