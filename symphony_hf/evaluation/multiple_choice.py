"""Accuracy of the most likely of given answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symphony_hf.data.questions import Question
from symphony_hf.errors import EvaluationError

from .batching import chunked, evaluating, question_bar
from .metrics import Choices

MAX_ANSWERS = 100
"""Maximum number of different answers to questions about images among which models choose by default."""


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """Answers that a model chooses."""

    chosen: np.ndarray
    """Index of the most likely answer. Shape: (questions,), integer."""
    answers: np.ndarray
    """Index of the correct answer. Same shape."""
    log_probs: list[np.ndarray]
    """Log-probability of each answer, summed over its tokens, in nats. Shape of each: (choices,)."""

    @classmethod
    def of(cls, log_probs: list[np.ndarray], answers: Sequence[int]) -> "ChoiceScores":
        """Choose the most likely answer of each question. Without questions, raises EvaluationError."""
        if not log_probs:
            raise EvaluationError("no questions: an accuracy needs at least one")
        return cls(np.array([scores.argmax() for scores in log_probs]), np.array(answers), log_probs)

    @property
    def choices(self) -> Choices:
        """The choices, for `metrics`."""
        return Choices(self.chosen[np.newaxis], self.answers)

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float((self.chosen == self.answers).mean())


def score_choices(
    model: nn.Module,
    questions: Iterable[Question],
    *,
    batch_size: int = 16,
    progress: str | None = None,
    total: int | None = None,
) -> ChoiceScores:
    """Choose the answer whose tokens are most likely after the prompt. Ties go to the first answer.

    One forward pass of the prompt scores all answers of one token; longer answers take rows of their own. Batching
    changes log-probabilities by rounding only.

    Args:
        model: A causal language model, or one with images. Its mode is restored.
        questions: Questions, of which one batch is in memory at a time.
        batch_size: Number of questions per forward pass.
        progress: Label of the progress bar; no bar when None.
        total: Number of questions, for the progress bar.

    Raises:
        EvaluationError: If there are no questions, or a log-probability is not finite.
    """
    log_probs: list[np.ndarray] = []
    answers: list[int] = []
    with evaluating(model) as device, question_bar(progress, total) as bar:
        for batch in chunked(questions, batch_size):
            for question, scores in zip(batch, _score_batch(model, batch, device), strict=True):
                check_finite(scores, len(answers))
                log_probs.append(scores)
                answers.append(question.answer)
            bar.update(len(batch))
    return ChoiceScores.of(log_probs, answers)


def check_finite(scores: np.ndarray, question: object) -> None:
    """Raise EvaluationError if the log-probability of an answer is not finite."""
    if not np.isfinite(scores).all():
        raise EvaluationError(
            f"question {question!r}: the log-probabilities of its answers are {scores.tolist()}. The model's logits "
            "are not finite: check the checkpoint, or load it in bfloat16 or float32"
        )


def _score_batch(model: nn.Module, questions: Sequence[Question], device: torch.device) -> list[np.ndarray]:
    rows, positions = _rows(questions)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row, _ in rows])
    # Padded on the right, where causal models do not see it, so that positions do not move.
    inputs: dict[str, Any] = {"attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()}
    pixels = [questions[number].pixel_values for _, number in rows]
    if any(images is not None for images in pixels):
        inputs["pixel_values"] = torch.cat([images for images in pixels if images is not None])
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits_BTV = model(input_ids=ids.to(device), **inputs).logits
    scores = [
        _log_prob(logits_BTV[row], len(questions[number].prompt), questions[number].choices[choice])
        for number, choice, row in positions
    ]
    values = iter(torch.stack(scores).tolist())
    return [np.array(list(islice(values, len(question.choices)))) for question in questions]


def _rows(questions: Sequence[Question]) -> tuple[list[tuple[list[int], int]], Iterator[tuple[int, int, int]]]:
    """Return the rows of a batch with the index of their question, and (question, choice, row) of each choice.

    The last token of a choice is predicted, not read, so choices that differ only in their last token share a row.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    rows: list[tuple[list[int], int]] = []
    positions = []
    for number, question in enumerate(questions):
        for choice, ids in enumerate(question.choices):
            key = (number, tuple(ids[:-1]))
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append((question.prompt + ids[:-1], number))
            positions.append((number, choice, numbers[key]))
    return rows, iter(positions)


def _log_prob(logits_TV: Tensor, start: int, choice: Sequence[int]) -> Tensor:
    """Compute the log-probability of a choice whose first token is at `start`, in nats."""
    logits_CV = logits_TV[start - 1 : start - 1 + len(choice)].float()
    chosen_C = torch.tensor(choice, device=logits_TV.device)
    return logits_CV.log_softmax(-1).gather(1, chosen_C.unsqueeze(1)).sum()
