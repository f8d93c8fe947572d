"""The documents to evaluate on, and their attacked forms."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.documents import Document
from symphony_hf.data.files import read_file
from symphony_hf.data.rows import thinned
from symphony_hf.errors import DataError
from symphony_hf.evaluation.attacks.text import attack_documents, find_text_attack
from symphony_hf.evaluation.perplexity import DocumentScores
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS

from .settings import AttackCase, RobustnessSettings

FEWEST_WORDS = 5
"""Of a document. A shorter one is a heading, and an attack may leave nothing of it."""

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class AttackedCorpus:
    """Clean documents and their attacked forms.

    Attributes:
        source: Description of the data source.
        documents: The clean documents.
        attacked: Attacked form of the documents for each attack case.
    """

    source: str
    documents: list[Document]
    attacked: dict[AttackCase, list[Document]]


def prepare_texts(settings: RobustnessSettings) -> AttackedCorpus:
    """Read the documents and attack them.

    Raises:
        DataError: If there is no such data, it has too few documents for an interval, or an attack changes none.
    """
    source, found = read_documents(settings)
    usable = [document for document in found if len(document.text.split()) >= FEWEST_WORDS]
    documents = list(thinned(usable, settings.documents))
    if len(documents) < MIN_DOCUMENTS:
        raise DataError(
            f"{source}: {len(documents)} documents of {FEWEST_WORDS} words or more to evaluate on, of {len(found)} "
            f"found; intervals need {MIN_DOCUMENTS}: give more text, another --split, or raise --documents"
        )
    cases = tqdm(settings.cases(), desc="Attacking", unit=" texts", delay=2, disable=None)
    return AttackedCorpus(source, documents, {case: attacked_form(documents, case, source) for case in cases})


def read_documents(settings: RobustnessSettings) -> tuple[str, list[Document]]:
    """What was read, and its documents, those without text included.

    Raises:
        DataError: If there is nothing to read, or it has no such split.
    """
    path = None if settings.data is None else Path(settings.data).expanduser()
    if path is not None and path.is_file():
        # A file has no splits of its own, and someone who gives one to evaluate on means all of it.
        splits = read_file(path, settings.text_column or "text")
        source, split = str(settings.data), settings.split or "all"
    else:
        corpus = load_corpus(settings.data, text_column=settings.text_column or "text")
        splits = {name: getattr(corpus, name) for name in _SPLITS}
        source, split = corpus.source, settings.split or "test"
    names = _SPLITS if split == "all" else (split,)
    return f"{source}, {split} split" if split != "all" else source, [d for name in names for d in splits[name]]


def attacked_form(documents: Sequence[Document], case: AttackCase, source: str) -> list[Document]:
    """Documents as an attack leaves them.

    Raises:
        DataError: If it changes none.
    """
    attack = find_text_attack(case.attack)
    attacked = attack_documents(documents, attack, attack.rate(case.severity), case.seed)
    if attacked == documents:
        raise DataError(
            f"{source}: {case.attack} at severity {case.severity} changes nothing in {len(documents)} documents: it "
            f"is an attack where {attack.what}; take another"
        )
    return attacked


Unit = Literal["token", "word", "byte"]


@dataclass(frozen=True, eq=False)
class TextScores:
    """One model on one form of all documents. Shape of each array: (documents,).

    Attributes:
        nll: Negative log-likelihood of all tokens of the document, in nats.
        num_tokens: Number of tokens.
        num_words: Number of words in the original document.
        num_bytes: Number of bytes of this form, in UTF-8.
        untouched_nll: The same over the tokens that the attack left alone.
        untouched_clean_nll: The same over those tokens in the original.
        num_untouched: Number of untouched tokens.
    """

    nll: np.ndarray
    num_tokens: np.ndarray
    num_words: np.ndarray
    num_bytes: np.ndarray
    untouched_nll: np.ndarray
    untouched_clean_nll: np.ndarray
    num_untouched: np.ndarray

    def per(self, unit: Unit, names: list[str]) -> DocumentScores:
        """The likelihood of the text, to be divided by its tokens, words or bytes."""
        divisor = {"token": self.num_tokens, "word": self.num_words, "byte": self.num_bytes}[unit]
        return DocumentScores(names, self.nll, divisor)

    def untouched(self, names: list[str]) -> tuple[DocumentScores, DocumentScores]:
        """The likelihood of the untouched tokens alone: in the original, and in this form."""
        return (
            DocumentScores(names, self.untouched_clean_nll, self.num_untouched),
            DocumentScores(names, self.untouched_nll, self.num_untouched),
        )


def pooled(forms: Sequence[TextScores]) -> TextScores:
    """Several attacked forms of the same documents as one: a document stays one draw, whatever was done to it.

    So the interval over documents does not shrink because the same document was attacked with several seeds.
    """
    columns = [field.name for field in dataclasses.fields(TextScores)]
    return TextScores(*(np.sum([getattr(form, column) for form in forms], axis=0) for column in columns))
