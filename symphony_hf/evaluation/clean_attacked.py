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

from .attacks.word_swap import attack
from .comparison import perplexity_interval
from .perplexity import DocumentScores, score_documents, score_stream
from .statistics import MIN_DOCUMENTS

if TYPE_CHECKING:
    from symphony_hf.recipe import EvalSection

WORD_SWAP = "word swap"
"""The only attack of a training run and of a study: the paper's, at the rate of their settings."""

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
        place of documents.
    """
    forms: dict[str | None, Sequence[Document]] = {None: documents, WORD_SWAP: swap_words(documents, section)}
    labels = {None: "Scoring clean text", WORD_SWAP: "Scoring attacked text"}
    if section.context:
        sizes = {"block_size": block_size, "context": section.context, "batch_size": batch_size}

        def score(form: str | None) -> DocumentScores:
            return score_stream(model, token_stream(forms[form], tokenizer), progress=labels[form], **sizes)
    else:
        windows = dict(zip(forms, clean_and_attacked_windows(documents, tokenizer, block_size, section), strict=True))

        def score(form: str | None) -> DocumentScores:
            return score_documents(model, windows[form], batch_size=batch_size, progress=labels[form])

    measured = measure_forms(score, [WORD_SWAP])
    clean = measured.clean
    values = {
        **perplexity_levels(measured),
        "documents": len(clean.names),
        "tokens": int(clean.num_tokens.sum()),
    }
    if len(clean.names) >= MIN_DOCUMENTS:
        for name, scores in (("clean", clean), ("attacked", measured.attacked[WORD_SWAP])):
            interval = perplexity_interval(scores, seed=section.seed)
            values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return values


def clean_and_attacked_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int, section: "EvalSection"
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Cut documents and their word-swapped forms into windows of tokens, by document name.

    Documents that are too short for a prediction in either form are left out of both.
    """
    names = [document.name for document in documents]
    cut = [document_windows(form, tokenizer, block_size) for form in (documents, swap_words(documents, section))]
    kept = [number for number in range(len(names)) if all(windows[number] for windows in cut)]
    clean, attacked = ({names[number]: windows[number] for number in kept} for windows in cut)
    return clean, attacked


def swap_words(documents: Sequence[Document], section: "EvalSection") -> list[Document]:
    """Return documents under the word swap at the rate of the settings."""
    return attack(documents, rate=section.attack_rate, minimum=section.attack_minimum, seed=section.seed)
