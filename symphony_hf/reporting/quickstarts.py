"""The reader of what `symphony quickstart` wrote."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..report import findings
from .graphs import read_run_graphs
from .intervals import as_interval
from .runs import Comparison, Cost, Level, Run, flat

_COMPARED = {
    "clean": ("clean", "ratio of perplexities"),
    "attacked": ("attacked", "ratio of perplexities"),
    "attacked_to_clean": ("attacked", "difference of attacked / clean"),
}
"""Of the report's comparisons: on which text, and what."""


def read_quickstart(folder: Path, report: Mapping[str, Any]) -> Run:
    """A folder with `report.json`, and the symphonized model in `symphony/`."""
    settings = {name: value for name, value in report["settings"].items() if name != "output"}
    return Run(
        folder=folder,
        kind="quickstart",
        about=f"plain and symphony copies of a small {report['model']['model_type']}, {report['corpus']['source']}",
        findings=findings(report),
        settings=flat({**settings, "model": report["model"], "corpus": report["corpus"]}),
        levels=list(_levels(report)),
        comparisons=list(_comparisons(report)),
        curves={
            model: {name: [(float(x), float(y)) for x, y in points] for name, points in by_name.items()}
            for model, by_name in report.get("curves", {}).items()  # of an older version there are none
        },
        graphs={"symphony": graphs} if (graphs := read_run_graphs(folder / "symphony")) else {},
        costs=[
            Cost(model, int(report["settings"]["finetune_steps"]), float(arm["seconds_per_step"]))
            for model, arm in report["arms"].items()
        ],
        seconds=float(report["seconds"]),
        versions=report["versions"],
        command=str(report["command"]),
    )


def _levels(report: Mapping[str, Any]) -> Iterator[Level]:
    for model, arm in report["arms"].items():
        for text in ("clean", "attacked"):
            interval = as_interval(arm[text])
            ends = interval.low, interval.high
            yield Level(model, "perplexity", text, interval.estimate, *ends, interval.num_documents)
        yield Level(model, "routing choices kept", "attacked", float(arm["routing_kept"]))


def _comparisons(report: Mapping[str, Any]) -> Iterator[Comparison]:
    for name, (text, what) in _COMPARED.items():
        values = report["comparisons"][name]
        yield Comparison("symphony", "plain", text, what, as_interval(values), values["verdict"], headline=True)
