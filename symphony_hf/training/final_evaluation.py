"""Final evaluation of a training run on the test split."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from symphony_hf.data.images.collator import VisualCollator
from symphony_hf.data.images.questions import VisualQuestions
from symphony_hf.data.prepared import PreparedData
from symphony_hf.data.questions import Question
from symphony_hf.data.rows import thinned
from symphony_hf.evaluation.clean_attacked import evaluate_documents
from symphony_hf.evaluation.metrics import METRICS, metric_interval
from symphony_hf.evaluation.multiple_choice import MAX_ANSWERS, score_choices
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS

from .trainer import ResumableTrainer

if TYPE_CHECKING:
    from symphony_hf.recipe import Recipe


def measure(recipe: "Recipe", trainer: ResumableTrainer, processor: Any, data: PreparedData) -> dict[str, Any]:
    """Evaluate the trained model on the test split. Every process calls this.

    Returns:
        For documents, clean and attacked perplexity, see `evaluate_documents`. Otherwise `loss`, the mean
        cross-entropy of all tokens with a label, and `perplexity` of the split named by `split` (the validation split
        if there is no test split), and `accuracy` for multiple-choice questions. Empty without either split.
    """
    if data.documents is not None:
        documents = thinned(data.documents, recipe.eval.documents)
        return evaluate_documents(
            trainer.model, processor, documents, recipe.data.block_size, recipe.eval, trainer.args.eval_batch_size
        )
    split = "validation" if data.test is None else "test"  # the labels of GLUE's test splits are not public
    held_out = getattr(data, split)
    if held_out is None:
        return {}
    loss = trainer.token_loss(held_out, split)
    with np.errstate(over="ignore"):  # a diverged loss has an infinite perplexity
        values = {"split": split, "loss": loss, "perplexity": float(np.exp(loss))}
    questions = _questions(held_out, data)
    if questions is not None:
        batch_size, total = trainer.args.eval_batch_size, len(held_out)
        scores = score_choices(trainer.model, questions, batch_size=batch_size, progress="Answering", total=total)
        values |= {"accuracy": scores.accuracy, "questions": len(scores.answers)}
        if len(scores.answers) >= MIN_DOCUMENTS:
            interval = metric_interval(METRICS["accuracy"], scores.choices, seed=recipe.eval.seed)
            values |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    return values


def _questions(held_out: Any, data: PreparedData) -> Iterable[Question] | None:
    """Return a split as multiple-choice questions; None if its questions have no choices."""
    if data.kind == "glue":
        return held_out.questions()
    if isinstance(data.collator, VisualCollator):
        questions = VisualQuestions(held_out, data.collator)
        answers = set(questions.answers())
        return questions.choices(sorted(answers)) if len(answers) <= MAX_ANSWERS else None
    return None
