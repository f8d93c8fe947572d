"""Final evaluation of a training run on the test split."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from symphony_hf.data.blocks import NO_LABEL
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
        For documents, clean and attacked perplexity, see `evaluate_documents`. Otherwise `loss`, the mean over all
        tokens in it, and `perplexity` of the split named by `split` (the validation split if there is no test split),
        and `accuracy` for multiple-choice questions. Empty without either split.
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
    loss = _mean_loss(trainer, held_out, split)
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


def _mean_loss(trainer: ResumableTrainer, held_out: Any, split: str) -> float:
    """Return the mean loss over all tokens in it, and log it. Trainer's own depends on how rows are put into batches.

    In a run of several processes, rows that fill up the last batch count twice.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, and of tokens in them
    arguments = trainer.args
    step, loop, is_mean = trainer.prediction_step, trainer.evaluation_loop, arguments.average_tokens_across_devices

    def summed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        num_tokens = int((inputs["labels"][..., 1:] != NO_LABEL).sum())
        result = step(model, inputs, *args, **kwargs)
        if num_tokens:
            sums.add_(torch.tensor([float(result[0]) * num_tokens, num_tokens], dtype=torch.float64))
        return result

    def over_tokens(*args: Any, **kwargs: Any) -> Any:
        output = loop(*args, **kwargs)
        total = sums
        if arguments.world_size > 1:
            total = trainer.accelerator.reduce(sums.to(arguments.device))
        output.metrics[f"{split}_loss"] = float(total[0] / total[1])
        return output

    trainer.prediction_step, trainer.evaluation_loop = summed, over_tokens  # type: ignore[method-assign]
    arguments.average_tokens_across_devices = False  # so that a batch's loss is the mean over its own tokens
    try:
        return trainer.evaluate(held_out, metric_key_prefix=split)[f"{split}_loss"]
    finally:
        del trainer.prediction_step, trainer.evaluation_loop
        arguments.average_tokens_across_devices = is_mean


def _questions(held_out: Any, data: PreparedData) -> Iterable[Question] | None:
    """Return a split as multiple-choice questions; None if its questions have no choices."""
    if data.kind == "glue":
        return held_out.questions()
    if isinstance(data.collator, VisualCollator):
        questions = VisualQuestions(held_out, data.collator)
        answers = set(questions.answers())
        return questions.choices(sorted(answers)) if len(answers) <= MAX_ANSWERS else None
    return None
