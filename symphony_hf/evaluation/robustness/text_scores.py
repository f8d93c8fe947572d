"""Likelihoods of documents in one form, and several attacked forms taken together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from symphony_hf.evaluation.perplexity import DocumentScores

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
