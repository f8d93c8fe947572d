"""Likelihoods of documents in one form, and several attacked forms taken together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from symphony_hf.evaluation.perplexity import DocumentScores
from symphony_hf.evaluation.words import has_spaces

Unit = Literal["token", "word", "byte"]


@dataclass(frozen=True, eq=False)
class TextScores:
    """Scores of one model on one form of all documents. Shape of each array: (documents,).

    Attributes:
        nll: Negative log-likelihood of all tokens of the document, in nats.
        num_tokens: Number of tokens.
        num_words: Number of words of this form.
        num_bytes: Number of bytes of this form, in UTF-8.
        untouched_nll: Negative log-likelihood of the tokens that the attack leaves alone.
        untouched_clean_nll: Negative log-likelihood of these tokens in the original.
        num_untouched: Number of untouched tokens.
        tokens: Digest of the tokens of all documents; empty for pooled forms.
    """

    nll: np.ndarray
    num_tokens: np.ndarray
    num_words: np.ndarray
    num_bytes: np.ndarray
    untouched_nll: np.ndarray
    untouched_clean_nll: np.ndarray
    num_untouched: np.ndarray
    tokens: str = ""

    @property
    def has_words(self) -> bool:
        """Whether spaces separate the words of the text, so that a perplexity per word says something."""
        return has_spaces(int(self.num_words.sum()), int(self.num_bytes.sum()))

    @property
    def sizes(self) -> np.ndarray:
        """Length of each document, by which it weighs: in words, or in bytes if the text has no spaces."""
        return self.num_words if self.has_words else self.num_bytes

    def per(self, unit: Unit, names: list[str]) -> DocumentScores:
        """Return the likelihood of the text with the number of its tokens, words or bytes."""
        divisor = {"token": self.num_tokens, "word": self.num_words, "byte": self.num_bytes}[unit]
        return DocumentScores(names, self.nll, divisor)

    def untouched(self, names: list[str]) -> tuple[DocumentScores, DocumentScores]:
        """Return the likelihoods of the untouched tokens in the original and in this form, of documents with any."""
        has = self.num_untouched > 0
        kept = [name for name, any_left in zip(names, has, strict=True) if any_left]
        return (
            DocumentScores(kept, self.untouched_clean_nll[has], self.num_untouched[has]),
            DocumentScores(kept, self.untouched_nll[has], self.num_untouched[has]),
        )


def pooled(forms: Sequence[TextScores]) -> TextScores:
    """Add up attacked forms of the same documents.

    A document stays one draw, so the interval over documents does not shrink with the number of attack seeds.
    """
    columns = [field.name for field in dataclasses.fields(TextScores) if field.name != "tokens"]
    return TextScores(*(np.sum([getattr(form, column) for form in forms], axis=0) for column in columns))
