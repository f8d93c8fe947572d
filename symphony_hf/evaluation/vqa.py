"""Answers that a model gives freely to questions about images, against the right ones."""

import string
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """What a model answered to each question."""

    given: list[str]
    """Its answers."""
    answers: list[str]
    """The right ones."""

    @property
    def correct(self) -> np.ndarray:
        """1 where both agree but for case, and spaces and punctuation at the ends; else 0. Shape: (questions,)."""
        pairs = zip(self.given, self.answers, strict=True)
        return np.array([float(_plain(given) == _plain(answer)) for given, answer in pairs])

    @property
    def accuracy(self) -> float:
        """Share of the questions that were answered right."""
        return float(self.correct.mean())


def _plain(text: str) -> str:
    return text.casefold().strip(string.whitespace + string.punctuation)
