"""GLUE tasks as questions for a causal language model: columns, prompts, labels and answers."""

from dataclasses import dataclass

from symphony_hf.errors import DataError, nearest


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task.

    Attributes:
        name: Name of the task in GLUE.
        columns: Columns with the sentences.
        prompt: Template with the columns in braces. The answer follows after a space.
        labels: Names of the labels in GLUE, in the order of their numbers.
        answers: Words that the model answers with, one per label.
        validation: GLUE's name of the split to report on.
        metrics: Metrics that GLUE reports beside accuracy, or instead: names in `evaluation.metrics.METRICS`.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    validation: str = "validation"
    metrics: tuple[str, ...] = ()


_NO_YES = ("no", "yes")
_YES_NO = ("yes", "no")

TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            ("sentence",),
            "Sentence: {sentence}\nIs the sentence grammatical?\nAnswer:",
            ("unacceptable", "acceptable"),
            _NO_YES,
            metrics=("matthews",),
        ),
        GlueTask(
            "sst2",
            ("sentence",),
            "Review: {sentence}\nIs the review negative or positive?\nAnswer:",
            ("negative", "positive"),
            ("negative", "positive"),
        ),
        GlueTask(
            "mrpc",
            ("sentence1", "sentence2"),
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDo both sentences mean the same?\nAnswer:",
            ("not_equivalent", "equivalent"),
            _NO_YES,
            metrics=("f1",),
        ),
        GlueTask(
            "qqp",
            ("question1", "question2"),
            "Question 1: {question1}\nQuestion 2: {question2}\nDo both questions ask the same?\nAnswer:",
            ("not_duplicate", "duplicate"),
            _NO_YES,
            metrics=("f1",),
        ),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            "Premise: {premise}\nHypothesis: {hypothesis}\nIs the hypothesis true, given the premise?\nAnswer:",
            ("entailment", "neutral", "contradiction"),
            ("yes", "maybe", "no"),
            validation="validation_matched",
        ),
        GlueTask(
            "qnli",
            ("question", "sentence"),
            "Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question?\nAnswer:",
            ("entailment", "not_entailment"),
            _YES_NO,
        ),
        GlueTask(
            "rte",
            ("sentence1", "sentence2"),
            "Premise: {sentence1}\nHypothesis: {sentence2}\nIs the hypothesis true, given the premise?\nAnswer:",
            ("entailment", "not_entailment"),
            _YES_NO,
        ),
        GlueTask(
            "wnli",
            ("sentence1", "sentence2"),
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDoes sentence 2 follow from sentence 1?\nAnswer:",
            ("not_entailment", "entailment"),
            _NO_YES,
        ),
    )
}

_REFUSED = {
    "stsb": "it asks for a number from 0 to 5, not for one of a few words",
    "ax": "it has no rows to train on",
}

STAND_IN = GlueTask(
    "stand-in",
    ("question", "sentence"),
    TASKS["qnli"].prompt,
    TASKS["qnli"].labels,
    TASKS["qnli"].answers,
)
"""Task of `data.path: embedded`, which needs no download and belongs to no GLUE task."""


def find_task(name: str) -> GlueTask:
    """Return the task of a name. Raises DataError if there is none, or its answers are not words to choose from."""
    if name in _REFUSED:
        raise DataError(f"data.name: GLUE's `{name}` is not supported: {_REFUSED[name]}; there are {', '.join(TASKS)}")
    if name not in TASKS:
        raise DataError(f"data.name: no GLUE task `{name}`; {nearest(name, TASKS)}")
    return TASKS[name]
