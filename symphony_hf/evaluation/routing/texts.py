"""Texts of routing diagnostics: documents and their attacked forms in windows, with labels of each token.

As in `symphony eval`, windows of both forms begin and end at the same words, each after one given token.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from symphony_hf.data.documents import SPLIT_NAMES
from symphony_hf.evaluation.documents import prepare_corpus
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.windows import (
    Tokens,
    Untouched,
    attacked_cuts,
    clean_cuts,
    covered_texts,
    cut,
    cut_clean,
    find_untouched,
    first_token,
    tokenize,
)

from .settings import RoutingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_DOMAINS = 8
LEAST_SHARE = 0.02
"""Minimum share of all tokens of a domain of its own."""

OTHERS = "other"
DISTANCES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, None))
"""Ranges of the distance in tokens from the last edit before a token, inclusive; 1 is right after it."""

DISTANCE_NAMES = ("1", "2-3", "4-7", "8-15", "16-31", "32 or more", "none before")
CLASS_NAMES = ("word start", "word inside", "number", "punctuation", "space")


@dataclass(frozen=True)
class Form:
    """Windows of all documents in one form, by name, and their numbers of tokens without the given first ones."""

    windows: dict[str, list[Tensor]]
    num_tokens: list[int]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest window."""
        return max(len(window) for parts in self.windows.values() for window in parts)

    @property
    def highest(self) -> int:
        """Highest token id."""
        return max(int(window.max()) for parts in self.windows.values() for window in parts)

    def kept_rows(self) -> np.ndarray:
        """Return which positions of all windows are tokens of a document. Shape: (rows,), bool."""
        lengths = [len(window) for parts in self.windows.values() for window in parts]
        kept = np.ones(sum(lengths), dtype=bool)
        kept[np.cumsum([0, *lengths[:-1]])] = False
        return kept


@dataclass(frozen=True)
class AttackedForm:
    """An attacked form, and the tokens that it shares with the clean one. Shape of each array: (untouched,).

    Attributes:
        form: Windows of the attacked form.
        clean: Positions of the shared tokens among all tokens of all clean documents.
        attacked: Positions of the shared tokens among all tokens of all attacked documents.
        document: Index of the document of each shared token.
        distance: Index in `DISTANCE_NAMES` of each shared token's distance from an edit of its window.
    """

    form: Form
    clean: np.ndarray
    attacked: np.ndarray
    document: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class ObservedTexts:
    """Texts that models run on.

    Attributes:
        source: Description of the data source.
        num_words: Number of words in all clean documents.
        clean: The documents as they are.
        attacked: Attacked form of the documents for each attack case.
        domains: Names of the domains.
        domain: Index of each clean token's domain. Shape: (tokens,).
        token_class: Index in `CLASS_NAMES` of each clean token's class. Shape: (tokens,).
    """

    source: str
    num_words: int
    clean: Form
    attacked: dict[AttackCase, AttackedForm]
    domains: list[str]
    domain: np.ndarray
    token_class: np.ndarray


def prepare_observed(settings: RoutingSettings, tokenizer: "PreTrainedTokenizerBase", block_size: int) -> ObservedTexts:
    """Read the documents, attack them, and cut both into windows.

    Raises:
        DataError: If the data does not exist, has too few documents for an interval, or an attack changes none.
    """
    corpus = prepare_corpus(settings, settings.words)
    documents = corpus.documents
    first, clean = first_token(tokenizer), tokenize(documents, tokenizer)
    names = [document.name for document in documents]
    attacked = {
        case: _align(names, clean, tokenize(form, tokenizer), block_size, first)
        for case, form in corpus.attacked.items()
    }
    domains, of_document = _domains(names, [len(tokens.ids) for tokens in clean])
    return ObservedTexts(
        source=corpus.source,
        num_words=sum(len(document.text.split()) for document in documents),
        clean=_form(names, clean, cut_clean(clean, block_size, first)),
        attacked=attacked,
        domains=domains,
        domain=np.repeat(of_document, [len(tokens.ids) for tokens in clean]),
        token_class=_classes(
            [token for tokens in clean for token in tokens.ids], tokenizer, covered_texts(documents, tokenizer)
        ),
    )


def _form(names: Sequence[str], tokens: Sequence[Tokens], windows: Sequence[list[Tensor]]) -> Form:
    return Form(dict(zip(names, windows, strict=True)), [len(own.ids) for own in tokens])


def _align(
    names: Sequence[str], clean: Sequence[Tokens], attacked: Sequence[Tokens], block_size: int, first: int
) -> AttackedForm:
    untouched = [find_untouched(before, after) for before, after in zip(clean, attacked, strict=True)]
    cuts = [clean_cuts(len(tokens.ids), block_size) for tokens in clean]
    ends = [
        attacked_cuts(own, kept, len(after.ids)) for own, kept, after in zip(cuts, untouched, attacked, strict=True)
    ]
    windows = [cut(after.ids, own, first) for after, own in zip(attacked, ends, strict=True)]
    starts = [np.cumsum([0, *(len(tokens.ids) for tokens in form[:-1])]) for form in (clean, attacked)]
    shifted = [
        (positions.clean + a, positions.attacked + b) for positions, a, b in zip(untouched, *starts, strict=True)
    ]
    distances = [_distances(*own) for own in zip(untouched, cuts, ends, strict=True)]
    return AttackedForm(
        form=_form(names, attacked, windows),
        clean=np.concatenate([positions for positions, _ in shifted]),
        attacked=np.concatenate([positions for _, positions in shifted]),
        document=np.repeat(np.arange(len(untouched)), [len(positions.clean) for positions in untouched]),
        distance=np.concatenate(distances),
    )


def _distances(untouched: Untouched, cuts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the distance of each untouched token from the last edit of its window, as an index of `DISTANCE_NAMES`.

    `cuts` and `ends` are the ends of the windows in the clean and in the attacked form.
    """
    number = len(untouched.clean)
    window = np.searchsorted(cuts, untouched.clean, side="right")  # in both forms
    starts = [np.append(0, form[:-1])[window] for form in (cuts, ends)]
    # A token that is first in one form alone has an edit before it in the other.
    is_first = (untouched.clean == starts[0]) & (untouched.attacked == starts[1])
    # Tokens with an edit right before them in the same window.
    before = [np.append(-1, positions[:-1]) for positions in untouched]
    is_behind = ~is_first & ((untouched.clean - before[0] != 1) | (untouched.attacked - before[1] != 1))
    last = np.maximum.accumulate(np.where(is_behind, np.arange(number), -1))
    has_edit = (last >= 0) & (window[last] == window)
    distance = untouched.attacked - untouched.attacked[last] + 1
    names = np.full(number, len(DISTANCES))
    for position, (least, most) in enumerate(DISTANCES):
        inside = (distance >= least) & (distance <= (most or distance.max(initial=least)))
        names[has_edit & inside] = position
    return names


def _domains(names: Sequence[str], num_tokens: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Return the domains by the first folder of documents' names, and the index of each document's domain."""
    folders = [_folder_of(name) for name in names]
    sizes: Counter[str] = Counter()
    for folder, size in zip(folders, num_tokens, strict=True):
        sizes[folder] += size
    least = LEAST_SHARE * sizes.total()
    kept = [folder for folder, size in sizes.most_common(MOST_DOMAINS) if size >= least]
    if len(sizes) > len(kept) and OTHERS not in kept:
        kept.append(OTHERS)
    return kept, np.array([kept.index(folder if folder in kept else OTHERS) for folder in folders])


def _folder_of(name: str) -> str:
    """Return the first folder in a document's name, except that of its split."""
    parts = name.split("/")
    if parts[0].lower() in SPLIT_NAMES:
        parts = parts[1:]
    return parts[0] if len(parts) > 1 else "top level"


def _classes(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", covered: Sequence[str] | None) -> np.ndarray:
    """Return the index of each token's class in `CLASS_NAMES`.

    Args:
        ids: Token ids.
        tokenizer: Their tokenizer.
        covered: Text that each token covers; None for a tokenizer without offsets, whose tokens are decoded.
    """
    marks_starts = any(piece[:1] in ("Ġ", "▁") for piece in tokenizer.get_vocab())
    decoded = {token: str(tokenizer.decode([token])) for token in set(ids)}
    texts = [decoded[token] for token in ids] if covered is None else covered
    kinds = {
        (token, text): CLASS_NAMES.index(_class_of(token, text, decoded[token], tokenizer, marks_starts))
        for token, text in set(zip(ids, texts, strict=True))
    }
    return np.array([kinds[own] for own in zip(ids, texts, strict=True)])


def _class_of(token: int, text: str, decoded: str, tokenizer: "PreTrainedTokenizerBase", marks_starts: bool) -> str:
    """Return the class of a token by the text that it covers, since parts of a character alone decode to no letter."""
    bare = text.strip()
    if not bare:
        return "space"
    if any(map(_is_letter, bare)) or bare == "_":
        # Byte-level and SentencePiece tokenizers mark a leading space, WordPiece its absence, and whole words nothing.
        piece = str(tokenizer.convert_ids_to_tokens(token))
        starts = piece[0] in "Ġ▁" or decoded[:1].isspace() if marks_starts else not piece.startswith("##")
        return "word start" if starts else "word inside"
    return "number" if any(letter.isdigit() for letter in bare) else "punctuation"


def _is_letter(character: str) -> bool:
    """Whether a character is a letter, or a mark on one, such as an Indic vowel."""
    return character.isalpha() or unicodedata.category(character).startswith("M")
