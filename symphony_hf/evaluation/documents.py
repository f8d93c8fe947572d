"""Documents to evaluate on, and their attacked forms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.documents import SPLITS, Document
from symphony_hf.data.files import read_file
from symphony_hf.data.rows import thinned
from symphony_hf.errors import DataError

from .attacks.text import attack_documents, find_text_attack
from .settings import AttackCase, EvaluationSettings
from .statistics import MIN_DOCUMENTS
from .words import are_spaced, count_words, first_words

MIN_WORDS = 5
"""Minimum number of words of a document. A shorter one is a heading, of which an attack may leave nothing."""


@dataclass(frozen=True)
class AttackedCorpus:
    """Clean documents, a description of their source, and the attacked form of the documents for each attack case."""

    source: str
    documents: list[Document]
    attacked: dict[AttackCase, list[Document]]


def prepare_corpus(settings: EvaluationSettings, words: int | None = None) -> AttackedCorpus:
    """Read the documents and attack them. Of each, keep the lines up to about the first `words` words; None for all.

    Raises:
        DataError: If the data does not exist, has too few documents for an interval, or an attack changes none of them
            or leaves nothing of one, or changes words where no spaces separate them.
    """
    source, found = _read_documents(settings)
    usable = [one for one in found if count_words(one.text, are_spaced([one.text])) >= MIN_WORDS]
    documents = [_shorten(document, words) for document in thinned(usable, settings.documents)]
    if len(documents) < MIN_DOCUMENTS:
        raise DataError(
            f"{source}: {len(documents)} documents of {MIN_WORDS} words or more to evaluate on, of {len(found)} "
            f"found; intervals need {MIN_DOCUMENTS}: give more text, another --split, or raise --documents"
        )
    for name in settings.attacks or ():
        find_text_attack(name).check_words([document.text for document in documents], source)
    # disable=None: no bar where the output is not a terminal, such as a log file.
    cases = tqdm(settings.cases(), desc="Attacking", unit=" texts", delay=2, disable=None)
    return AttackedCorpus(source, documents, {case: _attack(documents, case, source) for case in cases})


def _shorten(document: Document, words: int | None) -> Document:
    """Return the first lines of a document, up to the one in which it has enough words.

    A line that alone has more is cut after the words that are missing, since a text may be a single line.
    """
    if words is None:
        return document
    is_spaced, lines, number = are_spaced([document.text]), [], 0
    for line in document.text.splitlines(keepends=True):
        own = count_words(line, is_spaced)
        lines.append(line if own <= words else first_words(line, words - number, is_spaced))
        number += own
        if number >= words:
            break
    return Document(document.name, "".join(lines))


def _read_documents(settings: EvaluationSettings) -> tuple[str, list[Document]]:
    """Return a description of the data and all its documents.

    Raises:
        DataError: If the data or the split does not exist.
    """
    path = None if settings.data is None else Path(settings.data).expanduser()
    if path is not None and path.is_file():
        # A file has no splits, so it is evaluated as a whole.
        splits = read_file(path, settings.text_column or "text")
        source, split = str(settings.data), settings.split or "all"
    else:
        corpus = load_corpus(settings.data, text_column=settings.text_column or "text")
        splits = {name: getattr(corpus, name) for name in SPLITS}
        source, split = corpus.source, settings.split or "test"
    names = SPLITS if split == "all" else (split,)
    return f"{source}, {split} split" if split != "all" else source, [d for name in names for d in splits[name]]


def _attack(documents: Sequence[Document], case: AttackCase, source: str) -> list[Document]:
    """Attack all documents. Raises DataError if the attack changes none of them, or leaves nothing of one."""
    attack = find_text_attack(case.attack)
    attacked = attack_documents(documents, attack, attack.rate(case.severity), case.seed)
    if attacked == documents:
        raise DataError(
            f"{source}: {case.attack} at severity {case.severity} changes nothing in {len(documents)} documents: in "
            f"this attack, {attack.what}; use another attack"
        )
    emptied = next((document.name for document in attacked if not document.text.strip()), None)
    if emptied is not None:
        raise DataError(
            f"{source}: {case.attack} at severity {case.severity} leaves nothing of document {emptied!r}: leave it "
            "out, or use another attack"
        )
    return attacked
