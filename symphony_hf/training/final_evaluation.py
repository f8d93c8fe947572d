"""Final evaluation of a training run on the test split."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from symphony_hf.data.blocks import document_windows, token_stream
from symphony_hf.data.documents import Document
from symphony_hf.data.images.collator import VisualCollator
from symphony_hf.data.images.questions import VisualQuestions
from symphony_hf.data.prepared import PreparedData
from symphony_hf.data.questions import Question
from symphony_hf.evaluation.attacks.word_swap import attack
from symphony_hf.evaluation.comparison import perplexity_interval
from symphony_hf.evaluation.multiple_choice import accuracy_interval, score_choices
from symphony_hf.evaluation.perplexity import score_documents, score_stream
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS

from .trainer import ResumableTrainer

if TYPE_CHECKING:
    from symphony_hf.recipe import EvalSection, Recipe

MOST_ANSWERS = 100
"""Different answers up to which a question about an image is one of choosing."""


def measure(recipe: "Recipe", trainer: ResumableTrainer, processor: Any, data: PreparedData) -> dict[str, Any]:
    """Measure the trained model on the test split, as its kind of data has it.

    Args:
        recipe: Its data section says which kind.
        trainer: After training. Every process calls this.
        processor: The model's tokenizer or processor.
        data: Training data, with the test split.

    Returns:
        With whole documents: clean and attacked perplexity, see `evaluate_clean_and_attacked`. Otherwise `loss` and
        `perplexity` of the test split, or of the validation split where there is no other, as `split` says; and
        `accuracy` where its questions have answers to choose from. Nothing where neither is there.
    """
    if data.documents is not None:
        documents = data.documents[: recipe.eval.documents]
        return evaluate_clean_and_attacked(
            trainer.model, processor, documents, recipe.data.block_size, recipe.eval, trainer.args.eval_batch_size
        )
    split = "validation" if data.test is None else "test"  # the labels of GLUE's test splits are not public
    held_out = getattr(data, split)
    if held_out is None:
        return {}
    loss = trainer.evaluate(held_out, metric_key_prefix=split)[f"{split}_loss"]
    values = {"split": split, "loss": loss, "perplexity": math.exp(loss)}
    questions = _questions(held_out, data)
    if questions is not None:
        batch_size, total = trainer.args.eval_batch_size, len(held_out)
        scores = score_choices(trainer.model, questions, batch_size=batch_size, progress="Answering", total=total)
        values |= {"accuracy": scores.accuracy, "questions": len(scores.answers)}
        if len(scores.answers) >= MIN_DOCUMENTS:
            interval = accuracy_interval(scores, seed=recipe.eval.seed)
            values |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    return values


def _questions(held_out: Any, data: PreparedData) -> Iterable[Question] | None:
    """A split as questions with a choice of answers, where it is one."""
    if data.kind == "glue":
        return held_out.questions()
    if isinstance(data.collator, VisualCollator):
        questions = VisualQuestions(held_out, data.collator)
        answers = set(questions.answers())
        return questions.choices(sorted(answers)) if len(answers) <= MOST_ANSWERS else None
    return None


def evaluate_clean_and_attacked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[Document],
    block_size: int,
    section: "EvalSection",
    batch_size: int = 16,
) -> dict[str, Any]:
    """Perplexity on documents, as they are and with words swapped.

    Returns:
        `clean` and `attacked` perplexity, their ratio, and how many documents and tokens they come from; with enough
        documents, the ends of their 95% intervals, `clean_low` and so on. With `section.context` the documents are
        one text, and its windows are in place of them.
    """
    if section.context:
        texts = {"clean": documents, "attacked": _attacked(documents, section)}
        scores = {
            name: score_stream(
                model,
                token_stream(text, tokenizer),
                block_size=block_size,
                context=section.context,
                batch_size=batch_size,
                progress=f"Scoring {name} text",
            )
            for name, text in texts.items()
        }
    else:
        clean, attacked = clean_and_attacked_windows(documents, tokenizer, block_size, section)
        scores = {
            name: score_documents(model, windows, batch_size=batch_size, progress=f"Scoring {name} text")
            for name, windows in (("clean", clean), ("attacked", attacked))
        }
    values = {
        "clean": scores["clean"].perplexity,
        "attacked": scores["attacked"].perplexity,
        "ratio": scores["attacked"].perplexity / scores["clean"].perplexity,
        "documents": len(scores["clean"].names),
        "tokens": int(scores["clean"].num_tokens.sum()),
    }
    if len(scores["clean"].names) >= MIN_DOCUMENTS:
        for name, scored in scores.items():
            interval = perplexity_interval(scored, seed=section.seed)
            values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return values


def clean_and_attacked_windows(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, block_size: int, section: "EvalSection"
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """The documents in windows of tokens, as they are and with words swapped, by document name."""
    attacked = _attacked(documents, section)
    names = [document.name for document in documents]
    clean_windows = dict(zip(names, document_windows(documents, tokenizer, block_size), strict=True))
    attacked_windows = dict(zip(names, document_windows(attacked, tokenizer, block_size), strict=True))
    # A document too short for one prediction has nothing to score, in either form.
    kept = [name for name in names if clean_windows[name] and attacked_windows[name]]
    return {name: clean_windows[name] for name in kept}, {name: attacked_windows[name] for name in kept}


def _attacked(documents: list[Document], section: "EvalSection") -> list[Document]:
    return attack(documents, rate=section.attack_rate, minimum=section.attack_minimum, seed=section.seed)
