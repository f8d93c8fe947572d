"""Accuracy of a model that answers by the likeliest of given answers."""

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
    """Answers that a model chose."""

    chosen: np.ndarray
    """The number of the likeliest answer. Shape: (questions,), integer."""
    answers: np.ndarray
    """That of the right one. Same shape."""
    log_probs: list[np.ndarray]
    """Of each question's answers, summed over their tokens, in nats. Shape of each: (choices,)."""

    @property
    def correct(self) -> np.ndarray:
        """1 where the right answer was chosen, 0 elsewhere. Shape: (questions,)."""
        return (self.chosen == self.answers).astype(np.float64)

    @property
    def accuracy(self) -> float:
        """Share of the questions whose right answer was chosen."""
        return float(self.correct.mean())


def score_choices(
    model: nn.Module,
    questions: Iterable[Question],
    *,
    batch_size: int = 16,
    progress: str | None = None,
    total: int | None = None,
) -> ChoiceScores:
    """Choose the answer whose tokens are likeliest after the prompt.

    Answers of one token each are all read off one forward of the prompt; a longer one is a row of its own.

    Args:
        model: Any causal language model, or one with images. It is left in the mode that it came in.
        questions: From `LabelledQuestions.questions` or `VisualQuestions.choices`, one batch in memory at a time.
        batch_size: Questions per forward pass.
        progress: Label of the progress bar; no bar when None.
        total: Number of questions, for the progress bar.

    Returns:
        The choices, in the order of the questions. Ties go to the first answer. How questions fall into batches moves
        log-probabilities by rounding only.

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
    """The 95% interval of one model's accuracy. Compare models with `compare_accuracy`.

    Args:
        scores: Scores of one model.
        seed: Seed of the bootstrap.

    Returns:
        A level, which has no verdict.

    Raises:
        EvaluationError: If there are fewer than 10 questions.
    """
    return paired_bootstrap((scores.correct,), lambda correct, axis: correct.mean(axis), seed=seed, null=None)


def compare_accuracy(a: ChoiceScores, b: ChoiceScores, *, seed: int = 0) -> Interval:
    """The 95% interval of the accuracy of `a` minus that of `b`; `verdict(lower_is_better=False)` says which is better.

    Args:
        a: Scores of one model.
        b: Scores of another one, on the same questions.
        seed: Seed of the bootstrap.

    Raises:
        EvaluationError: If the questions differ, or are fewer than 10.
    """
    if not np.array_equal(a.answers, b.answers):
        raise EvaluationError("the two models answered different questions: score both on the same ones")

    def statistic(correct_a: np.ndarray, correct_b: np.ndarray, axis: int) -> np.ndarray:
        return correct_a.mean(axis) - correct_b.mean(axis)

    return paired_bootstrap((a.correct, b.correct), statistic, seed=seed, swapped=[(0, 1)])


def _score_batch(model: nn.Module, questions: Sequence[Question], device: torch.device) -> list[np.ndarray]:
    rows, places = _rows(questions)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row, _ in rows])
    # Padded on the right, where no token of a causal model sees it; so no position moves.
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
    """The rows of a batch, each with the number of its question; and where each choice is: (question, choice, row).

    The last token of a choice is predicted, not read. So choices that differ in their last token alone share a row.
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
