"""What a run has measured of its model, as a card shows it: the runner's `results.json`, the quickstart's report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..errors import PushError
from .folder import ModelFolder, read_json


@dataclass(frozen=True)
class Score:
    """A perplexity: what text it is on, and its interval where one was computed."""

    text: str
    value: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Results:
    """Clean and attacked, of how many documents, and what the run says of where it came from.

    Attributes:
        scores: Perplexities.
        documents: That they are of.
        data: What it was trained on: a data set's name on the Hub, a file's, or a description.
        base_model: What it was trained from, where that is a checkpoint.
        others: Further rows of the table.
    """

    scores: list[Score]
    documents: int
    data: str
    base_model: str | None = None
    others: dict[str, str] = field(default_factory=dict)


def read_results(folder: ModelFolder) -> Results | None:
    """What was measured of a folder's model; None where nothing was.

    Raises:
        PushError: If there is a file of results that cannot be read.
    """
    if folder.results is None:
        return None
    values = read_json(folder.results)
    try:
        return _from_report(folder.path, values) if "arms" in values else _from_run(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PushError(
            f"`{folder.results}` is neither a run's results nor a quickstart's report ({error!r}): move it away to "
            "push the model without it"
        ) from error


def _from_report(path: Path, report: Mapping[str, Any]) -> Results:
    arm = report["arms"].get("plain" if path.resolve().name == "plain" else "symphony")
    others = {"routing choices kept under attack": f"{arm['routing_kept']:.2%}"}
    return Results(_scores(arm), int(report["documents"]), report["corpus"]["source"], others=others)


def _from_run(results: Mapping[str, Any]) -> Results:
    test, recipe = results["test"], results["recipe"]
    data = recipe["data"]["path"] or "the library sources of the running Python"
    return Results(_scores(test), int(test["documents"]), data, recipe["model"]["path"])


def _scores(measured: Mapping[str, Any]) -> list[Score]:
    scores = []
    for text in ("clean", "attacked"):
        value = measured[text]
        if isinstance(value, Mapping):
            interval = (float(value[name]) for name in ("estimate", "low", "high", "confidence"))
            scores.append(Score(text, *interval))
        else:
            scores.append(Score(text, float(value)))
        if not 0 < scores[-1].value < math.inf:
            raise ValueError(f"a perplexity of {scores[-1].value}")
    return scores


def eval_results(results: Results, data_name: str, data_id: str | None) -> list[EvalResult]:
    """The scores as the Hub's model-index has them.

    Args:
        results: Of the run.
        data_name: Of the data, for people.
        data_id: Its name on the Hub, where it is there.
    """
    entries = []
    for score in results.scores:
        name = f"perplexity, {score.text}"
        if score.low is not None:
            name += f" [{score.confidence:.0%}: {score.low:.2f} to {score.high:.2f}]"
        entries.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=data_id or "text",
                dataset_name=f"{data_name}, {score.text}",
                dataset_config=score.text,
                dataset_split="test",
                metric_type="perplexity",
                metric_name=name,
                metric_value=score.value,
            )
        )
    return entries


def result_rows(results: Results) -> list[list[str]]:
    """The table of a card, header first."""
    rows = [["", "value"]]
    for score in results.scores:
        interval = f" [{score.confidence:.0%}]" if score.confidence is not None else ""
        rows.append([f"perplexity, {score.text}{interval}", str(score)])
    values = {score.text: score.value for score in results.scores}
    rows.append(["attacked / clean", f"{values['attacked'] / values['clean']:.4f}"])
    return rows + [[name, text] for name, text in results.others.items()]
