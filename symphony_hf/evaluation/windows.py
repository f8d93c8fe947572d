"""Documents and their attacked forms in windows that begin and end at the same words.

A window begins with a given token that is not predicted, so each token of a document is predicted once, and the
likelihood of a document can be divided by its words or bytes. A token has the same context in both forms, except for
the attack. With windows of a fixed length it would not, since attacked text has more tokens.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError, EvaluationError

from .checkpoint import ModelUnderTest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH = 256
"""Number of documents tokenized in one call."""

_MAX_BLOCK = 1024

_DEFAULT_BLOCK = 512
"""Number of tokens in a window if the model's config has no limit."""

_GROWTH = 4
"""Factor by which attacked text may have more tokens than clean text, at the default window size."""


class Tokens(NamedTuple):
    """A document in tokens.

    Attributes:
        ids: Token ids, without special tokens.
        lines: Line in which each token begins. Shape: (tokens,), int64, non-decreasing.
        unknown: Text of each token that is not in the vocabulary, by position; empty texts without offsets.
    """

    ids: list[int]
    lines: np.ndarray
    unknown: Mapping[int, str] = MappingProxyType({})

    def compared(self) -> list[Hashable]:
        """Return the ids, with the text in place of each unknown token, since an attack may turn one into another."""
        tokens: list[Hashable] = list(self.ids)
        for position, text in self.unknown.items():
            tokens[position] = text or object()  # an object equals no other one
        return tokens


class Untouched(NamedTuple):
    """Positions of the tokens that an attack leaves alone, in the document and in its attacked form, int64."""

    clean: np.ndarray
    attacked: np.ndarray


def tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> list[Tokens]:
    """Tokenize documents. Raises EvaluationError if one has no tokens.

    A tokenizer without offsets has all tokens in one line, which only makes the search for untouched tokens slower and
    less reliable.
    """
    found = [
        Tokens(ids, _lines(text, spans), _unknown(text, ids, spans, tokenizer.unk_token_id))
        for text, ids, spans in _encoded(documents, tokenizer)
    ]
    for document, tokens in zip(documents, found, strict=True):
        if not tokens.ids:
            raise EvaluationError(f"document {document.name!r} has no tokens: leave it out")
    return found


def covered_texts(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> list[str] | None:
    """Return the part of the text that each token of all documents covers; None from a tokenizer without offsets.

    Tokens that are parts of one character cover all of it.
    """
    if not tokenizer.is_fast:
        return None
    return [text[slice(*span)] for text, _, spans in _encoded(documents, tokenizer) for span in spans]


def _encoded(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, list[int], list[tuple[int, int]]]]:
    """Return each document's text, and the ids and offsets of its tokens; offsets are 0 if the tokenizer has none."""
    for start in range(0, len(documents), _BATCH):
        texts = [document.text for document in documents[start : start + _BATCH]]
        batch = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        positions = (
            batch["offset_mapping"] if tokenizer.is_fast else [[(0, 0)] * len(ids) for ids in batch["input_ids"]]
        )
        yield from zip(texts, batch["input_ids"], positions, strict=True)


def _lines(text: str, positions: Sequence[tuple[int, int]]) -> np.ndarray:
    ends = [match.start() for match in re.finditer("\n", text)]
    return np.searchsorted(ends, np.array([start for start, _ in positions], dtype=np.int64))


def _unknown(text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], unknown_id: int | None) -> dict[int, str]:
    own = (position for position, token in enumerate(ids) if token == unknown_id)
    return {position: text[slice(*spans[position])] for position in own}


def first_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that a window begins with: the beginning-of-text token, or else the end-of-text token.

    Raises:
        ConfigError: If the tokenizer has neither.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has neither a beginning-of-text nor an end-of-text token: set its `bos_token`"
        )
    return token


def clean_cuts(num_tokens: int, block_size: int) -> np.ndarray:
    """Return the ends of a document's windows, each of `block_size` tokens including the given one."""
    return np.append(np.arange(block_size - 1, num_tokens, block_size - 1), num_tokens)


def attacked_cuts(cuts: np.ndarray, untouched: Untouched, num_attacked: int) -> np.ndarray:
    """Return the ends of the attacked form's windows: at the same tokens, or in proportion between untouched ones.

    There are as many as `cuts`, the ends of the document's windows. They are non-decreasing; two are equal where much
    is dropped.
    """
    # Each end is between the end of the last untouched token and the start of the next.
    after_one = [np.append(0, positions + 1) for positions in untouched]
    at_other = [np.append(untouched.clean, cuts[-1]), np.append(untouched.attacked, num_attacked)]
    number = np.searchsorted(untouched.clean, cuts)
    start, room = after_one[0][number], (at_other[0] - after_one[0])[number]
    share = np.divide(cuts - start, room, out=np.ones(len(cuts)), where=room > 0)
    return after_one[1][number] + np.round(share * (at_other[1] - after_one[1])[number]).astype(np.int64)


def cut(ids: Sequence[int], cuts: np.ndarray, first: int) -> list[Tensor]:
    """Cut a document into windows, each after the given token. Shape of each: (2 or more,), int64."""
    starts = [0, *cuts[:-1].tolist()]
    pieces = zip(starts, cuts.tolist(), strict=True)
    return [torch.tensor([first, *ids[start:end]]) for start, end in pieces if end > start]


def cut_clean(documents: Sequence[Tokens], block_size: int, first: int) -> list[list[Tensor]]:
    """Cut documents into windows of `block_size` tokens, the given first one included."""
    return [cut(tokens.ids, clean_cuts(len(tokens.ids), block_size), first) for tokens in documents]


def cut_attacked(
    clean: Sequence[Tokens], attacked: Sequence[Tokens], untouched: Sequence[Untouched], block_size: int, first: int
) -> list[list[Tensor]]:
    """Cut attacked documents at the same words as `cut_clean` cuts the clean ones. Shape of each: (2 or more,)."""
    ends = _attacked_ends(clean, attacked, untouched, block_size)
    return [cut(after.ids, own, first) for after, own in zip(attacked, ends, strict=True)]


def longest_attacked(
    clean: Sequence[Tokens], attacked: Sequence[Tokens], untouched: Sequence[Untouched], block_size: int
) -> int:
    """Return the number of tokens in the longest window that `cut_attacked` cuts, the given first one included."""
    return 1 + max(int(np.diff(own, prepend=0).max()) for own in _attacked_ends(clean, attacked, untouched, block_size))


def _attacked_ends(
    clean: Sequence[Tokens], attacked: Sequence[Tokens], untouched: Sequence[Untouched], block_size: int
) -> Iterator[np.ndarray]:
    for before, after, kept in zip(clean, attacked, untouched, strict=True):
        yield attacked_cuts(clean_cuts(len(before.ids), block_size), kept, len(after.ids))


def default_block_size(models_under_test: Sequence[ModelUnderTest]) -> int:
    """Return a window size for clean text, the same for all models, that leaves room for attacked text."""
    limits = [checkpoint.max_tokens for checkpoint in models_under_test if checkpoint.max_tokens]
    return max(2, min([_MAX_BLOCK, *(limit // _GROWTH for limit in limits)])) if limits else _DEFAULT_BLOCK


def check_context(
    command: str, what: str, num_tokens: int, block_size: int, model: ModelUnderTest, *, under_attack: bool = False
) -> None:
    """Check that a model takes windows of `num_tokens` tokens, by its config.

    Args:
        command: Command that asks.
        what: Text of the windows.
        num_tokens: Number of tokens of the longest window.
        block_size: Number of tokens in a window of clean text.
        model: Model that reads the windows.
        under_attack: Whether the text is attacked, so that windows of clean text must be shorter for it to fit.

    Raises:
        ConfigError: If the windows are longer than the model's context.
    """
    most = model.max_tokens
    if most is None or num_tokens <= most:
        return
    size = block_size * most // num_tokens
    advice = f"set --block_size to {size} or less"
    if under_attack:
        # Shorter windows begin at other words, and one of them may grow more.
        advice = f"set --block_size to about {size} or less, so that the same words fit under attack"
        if size < 2:  # the given token, and one to predict
            advice = "the model's context is too short for this attack, so use another one"
    raise ConfigError(
        f"{command}: {what}: a window has {num_tokens} tokens, and `{model.source}` takes {most}: {advice}"
    )


def find_untouched(clean: Tokens, attacked: Tokens) -> Untouched:
    """Find the tokens that both forms of a document share, in order and line by line, since no attack moves lines."""
    blocks: list[tuple[int, int, int]] = []
    lines = np.intersect1d(clean.lines, attacked.lines)
    clean_tokens, attacked_tokens = clean.compared(), attacked.compared()
    # The first token of each line and of the next, in both forms.
    bounds = [np.searchsorted(form.lines, ends).tolist() for form in (clean, attacked) for ends in (lines, lines + 1)]
    for start, end, other_start, other_end in zip(*bounds, strict=True):
        own = _matching_blocks(clean_tokens[start:end], attacked_tokens[other_start:other_end])
        blocks += [(start + i, other_start + j, size) for i, j, size in own]
    return Untouched(*_positions(blocks))


SPAN = 2048
"""Number of tokens aligned at once. `SequenceMatcher` takes quadratic time, so spans keep the time linear in the length
of a document (20 ms for 2,000 tokens, of which a fifth are replaced)."""


def aligned_positions(
    clean_tokens: Sequence[Hashable], attacked_tokens: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Pair the tokens of a clean text with the same tokens of its attacked version, in order.

    Returns:
        Positions of equal tokens in the clean and in the attacked document. Both are strictly increasing integers of
        the same length.
    """
    return _positions(list(_matching_blocks(clean_tokens, attacked_tokens)))


def _matching_blocks(
    clean_tokens: Sequence[Hashable], attacked_tokens: Sequence[Hashable]
) -> Iterator[tuple[int, int, int]]:
    """Yield blocks of equal tokens, in order: where each begins in both texts, and its length."""
    i, j = 0, 0
    while i < len(clean_tokens) and j < len(attacked_tokens):
        # autojunk would ignore frequent tokens, which are the stop words that attacks leave alone.
        matcher = SequenceMatcher(None, clean_tokens[i : i + SPAN], attacked_tokens[j : j + SPAN], autojunk=False)
        *blocks, _ = matcher.get_matching_blocks()
        for a, b, size in blocks:
            yield i + a, j + b, size
        # Continue after the last match, since the two spans end at different words. Without a match, skip both.
        i += blocks[-1].a + blocks[-1].size if blocks else SPAN
        j += blocks[-1].b + blocks[-1].size if blocks else SPAN


def _positions(blocks: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of all tokens of blocks, in both texts."""
    starts, other_starts, sizes = np.array(blocks, dtype=np.int64).reshape(-1, 3).T
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + inside, np.repeat(other_starts, sizes) + inside
