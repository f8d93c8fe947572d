"""Answers that a model gives freely to questions about images, against the right ones."""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.visual import VisualPrompt
from ..errors import EvaluationError
from .batching import evaluating


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


def score_answers(
    model: nn.Module,
    prompts: Iterable[VisualPrompt],
    tokenizer: Any,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: str | None = None,
    total: int | None = None,
) -> AnswerScores:
    """Have a model answer questions about images greedily, up to its end of text.

    With answers to choose from, `score_choices` is surer: it does not depend on how a model words its answer.

    Args:
        model: With `generate`. It is left in the mode that it came in.
        prompts: From `VisualQuestions.prompts`, one batch in memory at a time.
        tokenizer: The model's, for its end of text and to decode.
        max_new_tokens: Of an answer.
        batch_size: Questions a batch.
        progress: What the progress bar says; no bar when None.
        total: How many questions there are, for the bar.

    Raises:
        EvaluationError: If there are no questions.
    """
    given: list[str] = []
    answers: list[str] = []
    remaining = iter(prompts)
    bar = tqdm(total=total, desc=progress, unit=" questions", delay=2, disable=True if progress is None else None)
    with evaluating(model) as device, bar:
        while batch := list(islice(remaining, batch_size)):
            inputs = {name: tensor.to(device) for name, tensor in _pad_left(batch, tokenizer.eos_token_id).items()}
            tokens = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            given += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            answers += [prompt.answer for prompt in batch]
            bar.update(len(batch))
    if not answers:
        raise EvaluationError("no questions: an accuracy needs at least one")
    return AnswerScores(given, answers)


def _pad_left(prompts: list[VisualPrompt], fill: int) -> dict[str, torch.Tensor]:
    """On the left, so that all answers begin at the same place, as `generate` needs it; it counts positions itself."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    gaps = [longest - len(prompt.input_ids) for prompt in prompts]
    ids = [[fill] * gap + prompt.input_ids for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def _plain(text: str) -> str:
    return text.casefold().strip(string.whitespace + string.punctuation)
