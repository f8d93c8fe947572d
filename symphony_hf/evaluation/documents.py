"""Documents to evaluate on, and their attacked forms."""

from collections.abc import Callable, Sequence
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

MIN_WORDS = 5
"""Minimum number of words of a document. A shorter one is a heading, of which an attack may leave nothing."""

_LONGEST_WORD = 50
"""Maximum mean number of bytes in a word. Above it, the text has no spaces, and a perplexity per word may overflow."""

_BYTES_PER_WORD = 6
"""Number of bytes that count as one word in text without spaces: an English word, or two Chinese characters."""


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
            or leaves nothing of one.
    """
    source, found = _read_documents(settings)
    usable = [document for document in found if _word_counter(document.text)(document.text) >= MIN_WORDS]
    documents = [_shorten(document, words) for document in thinned(usable, settings.documents)]
    if len(documents) < MIN_DOCUMENTS:
        raise DataError(
            f"{source}: {len(documents)} documents of {MIN_WORDS} words or more to evaluate on, of {len(found)} "
            f"found; intervals need {MIN_DOCUMENTS}: give more text, another --split, or raise --documents"
        )
    # disable=None: no bar where the output is not a terminal, such as a log file.
    cases = tqdm(settings.cases(), desc="Attacking", unit=" texts", delay=2, disable=None)
    return AttackedCorpus(source, documents, {case: _attack(documents, case, source) for case in cases})


def has_spaces(num_words: int, num_bytes: int) -> bool:
    """Whether spaces separate the words of a text, unlike in Chinese or Japanese."""
    return num_bytes <= _LONGEST_WORD * num_words


def num_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text.encode(errors="surrogatepass"))  # file names and texts need not be valid Unicode


def _word_counter(text: str) -> Callable[[str], int]:
    """Return a function that counts the words in parts of a text: by spaces, or by bytes if the text has none."""
    if has_spaces(len(text.split()), num_bytes(text)):
        return lambda part: len(part.split())
    return lambda part: num_bytes(part) // _BYTES_PER_WORD


def _shorten(document: Document, words: int | None) -> Document:
    """Return the first lines of a document, up to the one in which it has enough words."""
    if words is None:
        return document
    count_words, lines, number = _word_counter(document.text), [], 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        number += count_words(line)
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
