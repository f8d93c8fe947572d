"""Answers of a vision-language model to questions about images, asked through its own processor."""

import inspect
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symphony_hf.data.images.processors import Asked, Asker
from symphony_hf.data.questions import split_shared
from symphony_hf.errors import EvaluationError

from .batching import chunked, evaluating, question_bar
from .multiple_choice import ChoiceScores, check_finite
from .perplexity import next_token_nll

_OUTER = "PSZC"
"""Unicode categories of what may stand around an answer: punctuation, symbols, spaces and control characters."""

_MINUS = re.compile(r"\N{MINUS SIGN}|\N{EN DASH}(?=\.?\d)")

_BEFORE_DIGITS = re.compile(r"-?(?:(?<!\.)(?<!\. )\.)?$")
"""Minus and point of a number, at the end of what stands before its digits: -5 and .5 are other answers than 5.

The last point of an ellipsis is none of the number.
"""


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Free answers of a model."""

    given: list[str]
    """Answers of the model."""
    answers: list[str]
    """Correct answers."""

    @property
    def correct(self) -> np.ndarray:
        """1 where both agree up to case, and spaces and punctuation at the ends, else 0. Shape: (questions,).

        Punctuation alone agrees with the same punctuation alone, and the minus of a number counts.
        """
        pairs = zip(self.given, self.answers, strict=True)
        return np.array([float(_plain(given) == _plain(answer)) for given, answer in pairs])

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())


def _plain(text: str) -> str:
    """Return a text without case, and without spaces and punctuation at its ends if there is anything else in it.

    The minus and the point of a number stay, and letters are composed (NFC).
    """
    text = _MINUS.sub("-", unicodedata.normalize("NFC", text.casefold())).strip()
    inner = [position for position, letter in enumerate(text) if unicodedata.category(letter)[0] not in _OUTER]
    if not inner:
        return text
    start, end = inner[0], inner[-1] + 1
    if text[start].isdigit():
        start -= len(_BEFORE_DIGITS.search(text[:start])[0])  # type: ignore[index]
    return text[start:end]


def answer_freely(
    model: nn.Module,
    asker: Asker,
    asked: Iterable[Asked],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: str | None = None,
    total: int | None = None,
) -> AnswerScores:
    """Generate answers greedily, up to the end-of-text token.

    Args:
        model: A model with `generate`. Its mode is restored.
        asker: Asker made from the model's processor.
        asked: Questions, of which one batch is in memory at a time.
        max_new_tokens: Maximum number of tokens in an answer.
        batch_size: Number of questions in a batch.
        progress: Label of the progress bar; no bar when None.
        total: Number of questions, for the progress bar.

    Raises:
        EvaluationError: If there are no questions.
    """
    tokenizer = asker.processor.tokenizer
    given: list[str] = []
    answers: list[str] = []
    with evaluating(model) as device, question_bar(progress, total) as bar:
        for batch in chunked(asked, batch_size):
            inputs = _on(model, asker.prompts(batch), device)
            tokens = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=_ends(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            given += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            answers += [one.example.answer for one in batch]
            bar.update(len(batch))
    if not answers:
        raise EvaluationError("no questions: an accuracy needs at least one")
    return AnswerScores(given, answers)


def choose_answers(
    model: nn.Module,
    asker: Asker,
    asked: Iterable[Asked],
    answers: Sequence[str],
    *,
    batch_size: int = 8,
    progress: str | None = None,
    total: int | None = None,
) -> ChoiceScores:
    """Choose for each question the answer whose tokens are most likely. Ties go to the first.

    Args:
        model: A model that takes the processor's inputs. Its mode is restored.
        asker: Asker made from the model's processor.
        asked: Questions, of which one is in memory at a time; the correct answer of each is among `answers`.
        answers: Answers to choose from, the same for each question.
        batch_size: Number of question-answer pairs per forward pass.
        progress: Label of the progress bar; no bar when None.
        total: Number of questions, for the progress bar.

    Raises:
        DataError: If the tokenizer cannot tell two answers apart.
        EvaluationError: If there are no questions, or a log-probability is not finite.
    """
    log_probs: list[np.ndarray] = []
    right: list[int] = []
    with evaluating(model) as device, question_bar(progress, total) as bar:
        for one in asked:
            rows: list[tuple[list[int], np.ndarray]] = []
            for batch in chunked(answers, batch_size):
                inputs = _on(model, asker.answered([one] * len(batch), batch), device)
                rows += _token_scores(model, inputs)
            shared, _ = split_shared([ids for ids, _ in rows], answers)
            scores = np.array([values[len(shared) - 1 :].sum() for _, values in rows])
            check_finite(scores, one.example.name)
            log_probs.append(scores)
            right.append(list(answers).index(one.example.answer))
            bar.update(1)
    return ChoiceScores.of(log_probs, right)


def _token_scores(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[list[int], np.ndarray]]:
    """Return each row's token ids without padding, and the log-probability of each token but the first."""
    logits_BTV = model(**inputs).logits
    lengths = inputs["attention_mask"].sum(-1).tolist()
    rows = []
    for ids_T, logits_TV, length in zip(inputs["input_ids"], logits_BTV, lengths, strict=True):
        nll = next_token_nll(logits_TV[:length], ids_T[:length])
        rows.append((ids_T[:length].tolist(), -nll.cpu().numpy().astype(np.float64)))
    return rows


def _on(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Move inputs to the model's device, images also to its dtype, and drop those that the model does not take."""
    taken = inspect.signature(model.forward).parameters
    dtype = next(model.parameters()).dtype
    moved = {name: value.to(device) for name, value in inputs.items() if name in taken}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()}


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer; chat models often have another one than the end-of-text token."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    known = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in known if token is not None))
