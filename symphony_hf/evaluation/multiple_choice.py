"""Accuracy of the most likely of given answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    One row, the prompt, scores all answers of one token; longer answers take rows of their own. Batching changes
    log-probabilities by rounding only.

    Args:
        model: A causal language model, or one with images. Its mode is restored.
        questions: Questions, of which one batch is in memory at a time.
        batch_size: Maximum number of rows per forward pass, and of questions in memory.
        progress: Label of the progress bar; no bar when None.
        total: Number of questions, for the progress bar.

    Raises:
        EvaluationError: If there are no questions, or a log-probability is not finite.
    """
    log_probs: list[np.ndarray] = []
    answers: list[int] = []
    with evaluating(model) as device, question_bar(progress, total) as bar:
        for batch in chunked(questions, batch_size):
            for question, scores in zip(batch, _score_batch(model, batch, batch_size, device), strict=True):
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


class _Row(NamedTuple):
    """Tokens of a prompt with the beginning of an answer, the index of the question, and the choices that it scores."""

    ids: list[int]
    question: int
    choices: list[int]


def _score_batch(
    model: nn.Module, questions: Sequence[Question], batch_size: int, device: torch.device
) -> list[np.ndarray]:
    found = [np.empty(len(question.choices)) for question in questions]
    for rows in chunked(_rows(questions), batch_size):
        logits_BTV = model(**_inputs(rows, questions, device)).logits
        scored = [
            (row.question, choice, _log_prob(logits_TV, questions[row.question], choice))
            for row, logits_TV in zip(rows, logits_BTV, strict=True)
            for choice in row.choices
        ]
        # Synchronize with the device once per pass, not once per answer.
        values = torch.stack([log_prob for *_, log_prob in scored]).tolist()
        for (question, choice, _), value in zip(scored, values, strict=True):
            found[question][choice] = value
    return found


def _inputs(rows: Sequence[_Row], questions: Sequence[Question], device: torch.device) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.ids) for row in rows])
    # Padded on the right, where causal models do not see it, so that positions do not move.
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()}
    pixels = [images for row in rows if (images := questions[row.question].pixel_values) is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _rows(questions: Sequence[Question]) -> list[_Row]:
    """Return the rows of a batch.

    The last token of a choice is predicted, not read, so choices that differ only in their last token share a row.
    """
    rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for number, question in enumerate(questions):
        for choice, ids in enumerate(question.choices):
            row = rows.setdefault((number, tuple(ids[:-1])), _Row(question.prompt + ids[:-1], number, []))
            row.choices.append(choice)
    return list(rows.values())


def _log_prob(logits_TV: Tensor, question: Question, choice: int) -> Tensor:
    """Compute the log-probability of a choice after the question's prompt, in nats."""
    start, ids = len(question.prompt), question.choices[choice]
    logits_CV = logits_TV[start - 1 : start - 1 + len(ids)].float()
    chosen_C = torch.tensor(ids, device=logits_TV.device)
    return logits_CV.log_softmax(-1).gather(1, chosen_C.unsqueeze(1)).sum()
