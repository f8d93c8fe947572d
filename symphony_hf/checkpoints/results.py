"""Results of a run for its model card, from a recipe's `results.json` or the quickstart's report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub import EvalResult

from symphony_hf.errors import PushError
from symphony_hf.files import read_object

from .folder import ModelFolder
from .hub_names import origin_record, without_folders

Metric = Literal["perplexity", "loss", "accuracy"]
_CONFIDENCE = 0.95
"""Confidence level of the intervals in `results.json`, which has only their bounds."""
_DIGITS = {"perplexity": ".2f", "loss": ".4f", "accuracy": ".2%"}
_EMBEDDED = {
    "text": "the library sources of the running Python",
    "chat": "docstrings of the running Python's library",
    "glue": "a stand-in for GLUE, of docstrings of the running Python's library",
    "llava": "scikit-learn's handwritten digits",
}
"""Kind of data -> data of a recipe without a path."""
_TASKS = {"glue": "text-classification", "llava": "image-text-to-text"}


@dataclass(frozen=True)
class Score:
    """Measured value, with its interval if there is one."""

    metric: Metric
    value: float
    text: str
    """Measured text: `clean`, `attacked`, or the name of a split."""
    low: float | None = None
    high: float | None = None
    confidence: float = _CONFIDENCE

    def __post_init__(self) -> None:
        least, most = (0.0, 1.0) if self.metric == "accuracy" else (0.0, math.inf)
        for number in (self.value, self.low, self.high):
            if number is not None and not (math.isfinite(number) and least <= number <= most):
                raise ValueError(f"{self.metric} of {number}")
        if self.metric == "perplexity" and self.value == 0:
            raise ValueError("perplexity of 0")

    @property
    def name(self) -> str:
        """Name of the score, with the confidence level of its interval if it has one."""
        return f"{self.metric}, {self.text}" + (f" [{self.confidence:.0%}]" if self.low is not None else "")

    def __str__(self) -> str:
        digits = _DIGITS[self.metric]
        if self.low is None or self.high is None:
            return f"{self.value:{digits}}"
        return f"{self.value:{digits}} [{self.low:{digits}}, {self.high:{digits}}]"


@dataclass(frozen=True)
class Results:
    """Results of a run, with the origin of its model.

    Attributes:
        scores: Scores; empty if there was no held-out data.
        note: Description of the data that was measured on.
        data: Training data: name on the Hub, name of a file or folder, or a description.
        base_model: Name on the Hub of the checkpoint that training started from, if it has one.
        task: Task, by the Hub's name.
        config: Configuration of the data, if it has several, such as GLUE's task.
        others: Other rows of the table.
    """

    scores: list[Score]
    note: str
    data: str
    base_model: str | None = None
    task: str = "text-generation"
    config: str | None = None
    others: dict[str, str] = field(default_factory=dict)


def read_results(folder: ModelFolder) -> Results | None:
    """Return the results of a folder's model; None if there are none. A file that cannot be read raises PushError."""
    if folder.results is None:
        return None
    values = read_object(folder.results, PushError)
    try:
        return _from_report(folder, values) if "arms" in values else _from_run(folder, values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PushError(
            f"`{folder.results}` is neither a run's results nor a quickstart's report ({error!r}): move it away to "
            "push the model without it"
        ) from error


def _from_report(folder: ModelFolder, report: Mapping[str, Any]) -> Results:
    is_plain = "plain" in (folder.path.absolute().name, folder.path.resolve().name)
    arm = report["arms"].get("plain" if is_plain else "symphony")
    scores = []
    for text in ("clean", "attacked"):
        value, *interval = (float(arm[text][name]) for name in ("estimate", "low", "high", "confidence"))
        scores.append(Score("perplexity", value, text, *interval))
    others = {**_ratio(scores), "routing stability under attack": f"{arm['routing_kept']:.2%}"}
    data = without_folders(report["corpus"]["source"])
    return Results(scores, _of_documents(report["documents"]), data, others=others)


def _from_run(folder: ModelFolder, results: Mapping[str, Any]) -> Results:
    from symphony_hf.data.glue import HUB  # every program that loads a checkpoint imports this file

    measured, data = results["test"], results["recipe"]["data"]
    kind = data.get("kind", "text")
    origin = results.get("origin") or _guessed_origin(folder, results["recipe"])
    others: dict[str, str] = {}
    if "clean" in measured:
        # Text without spaces between its words is not attacked.
        scores = [_score("perplexity", measured, text, text) for text in ("clean", "attacked") if text in measured]
        note, others = _of_documents(measured["documents"], "attacked" in measured), _ratio(scores)
    elif measured:
        split = measured["split"]
        names: tuple[Metric, ...] = ("loss", "perplexity", "accuracy")
        # A run that diverged has others, which the Hub's card takes no score of.
        known = [name for name in names if name in measured and math.isfinite(float(measured[name]))]
        scores = [_score(name, measured, name, split) for name in known]
        questions = f", {int(measured['questions'])} questions" if "questions" in measured else ""
        note = f"On the {split} split{questions}; loss and perplexity are of the tokens that training predicts."
    else:
        scores, note = [], ""
    return Results(
        scores,
        note,
        # GLUE without a path is the Hub's, of which the origin has no record.
        HUB if kind == "glue" and data["path"] is None else origin["data"] or _EMBEDDED[kind],
        base_model=origin["base_model"],
        task=_TASKS.get(kind, "text-generation"),
        config=data.get("name"),
        others=others,
    )


def _guessed_origin(folder: ModelFolder, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a run whose results do not record it: a path of another machine may look like a name."""
    origin = origin_record(recipe["model"]["path"], recipe["data"]["path"])
    return origin | {"base_model": origin["base_model"] or folder.base_model}


def _score(metric: Metric, measured: Mapping[str, Any], name: str, text: str) -> Score:
    low, high = (measured.get(f"{name}_{end}") for end in ("low", "high"))
    return Score(metric, float(measured[name]), text, low, high)


def _of_documents(number: Any, is_attacked: bool = True) -> str:
    attacked = "; `attacked`: with words replaced by AAA" if is_attacked else ""
    return f"On {int(number)} held-out documents{attacked}."


def _ratio(scores: list[Score]) -> dict[str, str]:
    if len(scores) == 1:
        return {}
    clean, attacked = scores
    return {"attacked / clean": f"{attacked.value / clean.value:.4f}"}


def eval_results(results: Results, data_name: str, data_id: str | None) -> list[EvalResult]:
    """Return the scores in the form of the Hub's model-index, with the data's name on the Hub, if it has one."""
    entries = []
    for score in results.scores:
        name = f"{score.metric}, {score.text}"
        if score.low is not None:
            ends = " to ".join(f"{end:{_DIGITS[score.metric]}}" for end in (score.low, score.high))
            name += f" [{score.confidence:.0%}: {ends}]"
        is_form = score.text in ("clean", "attacked")
        entries.append(
            EvalResult(
                task_type=results.task,
                dataset_type=data_id or "text",
                dataset_name=f"{data_name}, {score.text}",
                dataset_config=score.text if is_form else results.config,
                dataset_split="test" if is_form else score.text,
                metric_type=score.metric,
                metric_name=name,
                metric_value=score.value,
            )
        )
    return entries


def result_rows(results: Results) -> list[list[str]]:
    """Return the rows of the card's table."""
    rows = [[score.name, str(score)] for score in results.scores]
    return [*rows, *([name, text] for name, text in results.others.items())]
