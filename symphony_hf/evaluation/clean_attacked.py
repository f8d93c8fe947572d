"""Scores of one model on clean inputs and on attacked forms of them.

`symphony eval`, the end of a training run and ablation studies measure with `measure_forms`. They differ in their
inputs and in what a score is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from symphony_hf.data.blocks import document_windows, token_stream
from symphony_hf.data.documents import Document
from symphony_hf.errors import DataError

from .attacks.text import warn_of_unspaced
from .attacks.word_swap import attack
from .comparison import perplexity_interval
from .perplexity import DocumentScores, score_documents, score_stream
from .statistics import MIN_DOCUMENTS
from .words import are_spaced

if TYPE_CHECKING:
    from symphony_hf.recipe import EvalSection

WORD_SWAP = "word swap"
"""The only attack of a training run and of a study: the paper's, at the rate of their settings."""

_NO_WORDS = "not attacked: no spaces separate the words of the documents, so the word swap would replace whole lines"

Scores = TypeVar("Scores")
"""Scores of a model on one form of the inputs."""


@dataclass(frozen=True, eq=False)
class Measured(Generic[Scores]):
    """Scores of one model on the clean inputs, and on each attacked form by attack."""

    clean: Scores
    attacked: dict[Any, Scores]


def measure_forms(
    score: Callable[[Any], Scores], attacks: Iterable[Any], *, progress: str | None = None
) -> Measured[Scores]:
    """Score a model on the clean inputs, and then on each attacked form.

    `score` is called with None for the clean form, and otherwise with the attack. `progress` is the label of the
    progress bar; there is none when None.
    """
    clean = score(None)
    # disable=None: no bar where the output is not a terminal, such as a log file.
    bar = tqdm(attacks, desc=progress, unit=" attacked forms", delay=2, disable=True if progress is None else None)
    return Measured(clean, {attack: score(attack) for attack in bar})


class _HasPerplexity(Protocol):
    @property
    def perplexity(self) -> float: ...


def perplexity_levels(measured: Measured[Any]) -> dict[str, float]:
    """Return the `clean` and `attacked` perplexities of a model under one attack, and their `ratio`."""
    scores: list[_HasPerplexity] = [measured.clean, *measured.attacked.values()]
    clean, attacked = (one.perplexity for one in scores)
    return {"clean": clean, "attacked": attacked, "ratio": attacked / clean}


def evaluate_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    block_size: int,
    section: "EvalSection",
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure the perplexity of documents, clean and under the word swap.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the model.
        documents: Clean documents.
        block_size: Number of tokens in a window.
        section: Attack, and context: with `section.context`, the documents are one text in overlapping windows.
        batch_size: Number of windows in a batch.

    Returns:
        `clean` and `attacked` perplexity, their `ratio`, and the numbers of `documents` and `tokens`. With enough
        documents, also the ends of their 95% intervals, `clean_low` and so on. With `section.context`, windows take the
        place of documents. Without spaces between the words of the documents, the clean ones alone, and `note`, which
        says so.
    """
    attacks = [WORD_SWAP] if are_spaced([document.text for document in documents]) else []
    forms: dict[str | None, Sequence[Document]] = {None: documents}
    if attacks:
        forms[WORD_SWAP] = swap_words(documents, section)
    labels = {None: "Scoring clean text", WORD_SWAP: "Scoring attacked text"}
    if section.context:
        sizes = {"block_size": block_size, "context": section.context, "batch_size": batch_size}

        def score(form: str | None) -> DocumentScores:
            return score_stream(model, token_stream(forms[form], tokenizer), progress=labels[form], **sizes)
    else:
        windows = dict(zip(forms, _windows(list(forms.values()), tokenizer, block_size), strict=True))

        def score(form: str | None) -> DocumentScores:
            return score_documents(model, windows[form], batch_size=batch_size, progress=labels[form])

    measured = measure_forms(score, attacks)
    clean = measured.clean
    values: dict[str, Any] = perplexity_levels(measured) if attacks else {"clean": clean.perplexity, "note": _NO_WORDS}
    values |= {"documents": len(clean.names), "tokens": int(clean.num_tokens.sum())}
    if len(clean.names) >= MIN_DOCUMENTS:
        for name, scores in zip(("clean", "attacked"), (clean, *measured.attacked.values()), strict=False):
            interval = perplexity_interval(scores, seed=section.seed)
            values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return values


def clean_and_attacked_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int, section: "EvalSection"
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Cut documents and their word-swapped forms into windows of tokens, by document name.

    Documents that are too short for a prediction in either form are left out of both. Raises DataError if no spaces
    separate their words.
    """
    clean, attacked = _windows((documents, swap_words(documents, section)), tokenizer, block_size)
    return clean, attacked


def _windows(
    forms: Sequence[Sequence[Document]], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> list[dict[str, list[Tensor]]]:
    """Return the windows of each form of documents by name, without documents that are too short in any form."""
    cut = [document_windows(form, tokenizer, block_size) for form in forms]
    names = [document.name for document in forms[0]]
    kept = [number for number in range(len(names)) if all(windows[number] for windows in cut)]
    return [{names[number]: windows[number] for number in kept} for windows in cut]


def swap_words(documents: Sequence[Document], section: "EvalSection") -> list[Document]:
    """Return documents under the word swap at the rate of the settings.

    Raises:
        DataError: If no spaces separate the words of the documents.
    """
    texts = [document.text for document in documents]
    if not are_spaced(texts):
        raise DataError(
            "the word swap needs words that are separated by spaces, and no spaces separate the words of these "
            "documents: give other text"
        )
    warn_of_unspaced(texts, "the word swap", "it")
    return attack(documents, rate=section.attack_rate, minimum=section.attack_minimum, seed=section.seed)
