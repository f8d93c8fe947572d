"""Accuracy of the most likely of given answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from symphony_hf.data.questions import Question
from symphony_hf.errors import EvaluationError

from .batching import evaluating
from .statistics import Interval, paired_bootstrap


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """Answers that a model chooses."""

    chosen: np.ndarray
    """Index of the most likely answer. Shape: (questions,), integer."""
    answers: np.ndarray
    """Index of the correct answer. Same shape."""
    log_probs: list[np.ndarray]
    """Log-probability of each answer, summed over its tokens, in nats. Shape of each: (choices,)."""

    @property
    def correct(self) -> np.ndarray:
        """1 where the correct answer is chosen, 0 elsewhere. Shape: (questions,)."""
        return (self.chosen == self.answers).astype(np.float64)

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())


def score_choices(
    model: nn.Module,
    questions: Iterable[Question],
    *,
    batch_size: int = 16,
    progress: str | None = None,
    total: int | None = None,
) -> ChoiceScores:
    """Choose the answer whose tokens are most likely after the prompt.

    One forward pass of the prompt scores all answers of one token; longer answers take rows of their own.

    Args:
        model: A causal language model, or one with images. Its mode is restored.
        questions: Questions, of which one batch is in memory at a time.
        batch_size: Number of questions per forward pass.
        progress: Label of the progress bar; no bar when None.
        total: Number of questions, for the progress bar.

    Returns:
        The choices, in the order of the questions. Ties go to the first answer. Batching changes log-probabilities by
        rounding only.

    Raises:
        EvaluationError: If there are no questions, or a log-probability is not finite.
    """
    if batch_size < 1:
        raise EvaluationError(f"`batch_size` must be at least 1, got {batch_size}")
    log_probs: list[np.ndarray] = []
    answers: list[int] = []
    remaining = iter(questions)
    bar = tqdm(total=total, desc=progress, unit=" questions", delay=2, disable=True if progress is None else None)
    with evaluating(model) as device, bar:
        while batch := list(islice(remaining, batch_size)):
            for question, scores in zip(batch, _score_batch(model, batch, device), strict=True):
                if not np.isfinite(scores).all():
                    raise EvaluationError(
                        f"question {len(answers)}: the log-probabilities of its answers are {scores.tolist()}. The "
                        "model's logits are not finite: check the checkpoint, or load it in bfloat16 or float32"
                    )
                log_probs.append(scores)
                answers.append(question.answer)
            bar.update(len(batch))
    if not answers:
        raise EvaluationError("no questions: an accuracy needs at least one")
    return ChoiceScores(np.array([scores.argmax() for scores in log_probs]), np.array(answers), log_probs)


def accuracy_interval(scores: ChoiceScores, *, seed: int = 0) -> Interval:
    """Compute the 95% interval of one model's accuracy. Compare models with `compare_accuracy`.

    Args:
        scores: Scores of one model.
        seed: Seed of the bootstrap.

    Returns:
        The interval of a level, which has no verdict.

    Raises:
        EvaluationError: If there are fewer than 10 questions.
    """
    return paired_bootstrap((scores.correct,), lambda correct, axis: correct.mean(axis), seed=seed, null=None)


def compare_accuracy(a: ChoiceScores, b: ChoiceScores, *, seed: int = 0) -> Interval:
    """Compute the 95% interval of the accuracy of `a` minus that of `b`. Use `verdict(lower_is_better=False)`.

    Args:
        a: Scores of one model.
        b: Scores of another model on the same questions.
        seed: Seed of the bootstrap.

    Raises:
        EvaluationError: If the questions differ, or there are fewer than 10.
    """
    if not np.array_equal(a.answers, b.answers):
        raise EvaluationError("the two models answered different questions: score both on the same questions")

    def statistic(correct_a: np.ndarray, correct_b: np.ndarray, axis: int) -> np.ndarray:
        return correct_a.mean(axis) - correct_b.mean(axis)

    return paired_bootstrap((a.correct, b.correct), statistic, seed=seed, swapped=[(0, 1)])


def _score_batch(model: nn.Module, questions: Sequence[Question], device: torch.device) -> list[np.ndarray]:
    rows, places = _rows(questions)
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
        for number, choice, row in places
    ]
    values = iter(torch.stack(scores).tolist())
    return [np.array(list(islice(values, len(question.choices)))) for question in questions]


def _rows(questions: Sequence[Question]) -> tuple[list[tuple[list[int], int]], Iterator[tuple[int, int, int]]]:
    """Return the rows of a batch with the index of their question, and (question, choice, row) of each choice.

    The last token of a choice is predicted, not read, so choices that differ only in their last token share a row.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    rows: list[tuple[list[int], int]] = []
    places = []
    for number, question in enumerate(questions):
        for choice, ids in enumerate(question.choices):
            key = (number, tuple(ids[:-1]))
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append((question.prompt + ids[:-1], number))
            places.append((number, choice, numbers[key]))
    return rows, iter(places)


def _log_prob(logits_TV: Tensor, start: int, choice: Sequence[int]) -> Tensor:
    """Compute the log-probability of a choice whose first token is at `start`, in nats."""
    logits_CV = logits_TV[start - 1 : start - 1 + len(choice)].float()
    chosen_C = torch.tensor(choice, device=logits_TV.device)
    return logits_CV.log_softmax(-1).gather(1, chosen_C.unsqueeze(1)).sum()
