"""What a recipe's run measures at its end, on the test split."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Document, PreparedData, Question, VisualCollator, VisualQuestions, attack, document_windows
from ..evaluation import MIN_DOCUMENTS, accuracy_interval, score_choices, score_documents
from .trainer import ResumableTrainer

if TYPE_CHECKING:
    from ..recipe import EvalSection, Recipe

MOST_ANSWERS = 100
"""Different answers up to which a question about an image is one of choosing."""


def measure(recipe: "Recipe", trainer: ResumableTrainer, processor: Any, data: PreparedData) -> dict[str, Any]:
    """Measure the trained model on the test split, as its kind of data has it.

    Args:
        recipe: Its data section says which kind.
        trainer: After training. Every process calls this.
        processor: The model's tokenizer or processor.
        data: What it was trained on, with the test split.

    Returns:
        With whole documents: clean and attacked perplexity, see `evaluate_clean_and_attacked`. Otherwise `loss` and
        `perplexity` of the test split, and `accuracy` where its questions have answers to choose from; nothing where
        there is no test split.
    """
    if data.documents is not None:
        documents = data.documents[: recipe.eval.documents]
        return evaluate_clean_and_attacked(trainer.model, processor, documents, recipe.data.block_size, recipe.eval)
    if data.test is None:
        return {}
    values = _loss(trainer, data)
    questions = _questions(data, processor)
    if questions is not None:
        scores = score_choices(
            trainer.model,
            questions,
            batch_size=trainer.args.eval_batch_size,
            progress="Answering",
            total=len(data.test),
        )
        values |= {"accuracy": scores.accuracy, "questions": len(scores.answers)}
        if len(scores.answers) >= MIN_DOCUMENTS:
            interval = accuracy_interval(scores, seed=recipe.eval.seed)
            values |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    return values


def _questions(data: PreparedData, processor: Any) -> Iterable[Question] | None:
    """The test split as questions with a choice of answers, where it is one."""
    if data.kind == "glue":
        return data.test.questions()
    if isinstance(data.collator, VisualCollator):
        questions = VisualQuestions(data.test, data.collator)
        answers = {prompt.answer for prompt in questions.prompts()}
        return questions.choices(sorted(answers)) if len(answers) <= MOST_ANSWERS else None
    return None


def _loss(trainer: ResumableTrainer, data: PreparedData) -> dict[str, Any]:
    loss = trainer.evaluate(data.test, metric_key_prefix="test")["test_loss"]
    return {"loss": loss, "perplexity": math.exp(loss)}


def evaluate_clean_and_attacked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[Document],
    block_size: int,
    section: "EvalSection",
) -> dict[str, Any]:
    """Perplexity on documents, as they are and with words swapped.

    Returns:
        `clean` and `attacked` perplexity, their ratio, and how many documents and tokens they come from.
    """
    clean, attacked = clean_and_attacked_windows(documents, tokenizer, block_size, section)
    scores = {
        name: score_documents(model, windows, progress=f"Scoring {name} text")
        for name, windows in (("clean", clean), ("attacked", attacked))
    }
    return {
        "clean": scores["clean"].perplexity,
        "attacked": scores["attacked"].perplexity,
        "ratio": scores["attacked"].perplexity / scores["clean"].perplexity,
        "documents": len(scores["clean"].names),
        "tokens": int(scores["clean"].num_tokens.sum()),
    }


def clean_and_attacked_windows(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, block_size: int, section: "EvalSection"
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """The documents in windows of tokens, as they are and with words swapped, by document name."""
    attacked = attack(documents, rate=section.attack_rate, minimum=section.attack_minimum, seed=section.seed)
    names = [document.name for document in documents]
    clean_windows = dict(zip(names, document_windows(documents, tokenizer, block_size), strict=True))
    attacked_windows = dict(zip(names, document_windows(attacked, tokenizer, block_size), strict=True))
    # A document too short for one prediction has nothing to score, in either form.
    kept = [name for name in names if clean_windows[name] and attacked_windows[name]]
    return {name: clean_windows[name] for name in kept}, {name: attacked_windows[name] for name in kept}
