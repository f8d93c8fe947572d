"""The documents to evaluate on, and their attacked forms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..attacks import attack_documents, find_text_attack
from ..data import Document, load_corpus
from ..data.files import read_file
from ..data.rows import thinned
from ..errors import DataError
from ..evaluation import MIN_DOCUMENTS
from .plan import Cell, RobustnessSettings

FEWEST_WORDS = 5
"""Of a document. A shorter one is a heading, and an attack may leave nothing of it."""

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Texts:
    """What is evaluated on.

    Attributes:
        source: What was read.
        documents: As they are.
        attacked: Their attacked forms.
    """

    source: str
    documents: list[Document]
    attacked: dict[Cell, list[Document]]


def prepare_texts(settings: RobustnessSettings) -> Texts:
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
    cells = tqdm(settings.cells(), desc="Attacking", unit=" texts", delay=2, disable=None)
    return Texts(source, documents, {cell: attacked_form(documents, cell, source) for cell in cells})


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


def attacked_form(documents: Sequence[Document], cell: Cell, source: str) -> list[Document]:
    """Documents as an attack leaves them.

    Raises:
        DataError: If it changes none.
    """
    attack = find_text_attack(cell.attack)
    attacked = attack_documents(documents, attack, attack.rate(cell.severity), cell.seed)
    if attacked == documents:
        raise DataError(
            f"{source}: {cell.attack} at severity {cell.severity} changes nothing in {len(documents)} documents: it "
            f"is an attack where {attack.what}; take another"
        )
    return attacked
