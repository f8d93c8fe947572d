"""What a model made of each document in one form of the text, and how forms are taken together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..evaluation import DocumentScores

Unit = Literal["token", "word", "byte"]


@dataclass(frozen=True, eq=False)
class TextScores:
    """One model on one form of all documents. Shape of each array: (documents,).

    Attributes:
        nll: Negative log-likelihood of all tokens of the document, in nats.
        num_tokens: Its tokens.
        num_words: Words of the original document, whatever has become of them.
        num_bytes: Of this form of it, in UTF-8.
        untouched_nll: That of the tokens which are in the original, too.
        untouched_clean_nll: That of the same tokens in the original.
        num_untouched: How many they are.
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
