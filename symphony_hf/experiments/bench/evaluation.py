"""`symphony bench-evaluation`: `symphony eval` and `symphony routing` beside the bare forwards that they need.

The arguments of all forwards are noted in a first run of each command. In each round the command runs again, and then
the bare model runs with the same arguments, twice; the second time over the first is the noise. Everything runs in one
process, so the start of Python is left out. What a command does beside forwards (reading, attacking and tokenizing
text, statistics, and pictures for `routing`) depends on the text and hardly on the model.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.checkpoint import ModelUnderTest
from symphony_hf.evaluation.routing.settings import RoutedModel
from symphony_hf.results import check_file_place
from symphony_hf.tables import Table

from .results import number_cell, print_result, range_cell, write_result
from .timing import clock, quartiles, using_threads

_DTYPE = "auto"
"""The commands' own default."""


@dataclass(frozen=True)
class EvaluationMeasurement:
    """One command, beside the bare forwards that it needs.

    Attributes:
        command: `eval`; `routing`; or `routing and its pictures`.
        forwards: Number of forwards.
        seconds: Median time of the command.
        forward_seconds: Median time of the bare forwards.
        ratio: Median over rounds of the command's time over that of the bare forwards.
        low: 25th percentile of these ratios.
        high: 75th percentile of these ratios.
        noise: Median over rounds of the time of the bare forwards, run again, over their time.
        noise_low: 25th percentile of these ratios.
        noise_high: 75th percentile of these ratios.
    """

    command: str
    forwards: int
    seconds: float
    forward_seconds: float
    ratio: float
    low: float
    high: float
    noise: float
    noise_low: float
    noise_high: float


def run_bench_evaluation(
    model: str,
    *,
    rounds: int = 5,
    data: str | None = None,
    split: str | None = None,
    tokenizer: str | None = None,
    documents: int | None = None,
    threads: int | None = None,
    output: str | Path = "symphony-bench-evaluation.json",
) -> dict[str, Any]:
    """Measure both commands, and write the result as JSON.

    Beside the model that a command loads, the bare one stays in memory.

    Args:
        model: Checkpoint of a causal language model with experts: a folder, or a name on the Hub.
        rounds: Number of rounds.
        data: Text, as for the commands; if None, their default, the sources of the running Python's library.
        split: Split of the data, as for the commands.
        tokenizer: Tokenizer, where the model's folder has none.
        documents: Maximum number of documents; if None, each command's own default.
        threads: Threads on the CPU; PyTorch's own number if None. With 1, CPU time is taken, not the clock's.
        output: Path of the JSON file.

    Returns:
        The measurements, their settings and the machine.

    Raises:
        ConfigError: If a number is too small, or the model cannot be loaded.
        UnsupportedModelError: If none of its routers is known.
    """
    check_file_place(output, "bench-evaluation")
    for option, value in (("rounds", rounds), ("documents", documents), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"bench-evaluation: `{option}` must be at least 1, got {value}")
    settings: dict[str, Any] = {"model": model, "data": data, "split": split, "tokenizer": tokenizer}
    if documents is not None:
        settings["documents"] = documents
    rows: list[EvaluationMeasurement] = []
    with (
        using_threads(threads),
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=2 * (rounds + 1), desc="bench-evaluation", unit=" runs", disable=None) as bar,
    ):
        tested = RoutedModel(model, None, _DTYPE)  # which refuses one without experts
        for number, run in enumerate((_run_eval, _run_routing)):
            with noted_calls() as calls:
                run(settings, Path(scratch) / str(number), torch.device("cpu"))
            bar.update()
            bare = tested.model
            taken: list[dict[str, float]] = []
            forwards: list[float] = []
            again: list[float] = []
            for turn in range(rounds):
                # Finished measurements in a folder would be used again.
                taken.append(run(settings, Path(scratch) / f"{number}-{turn}", bare.device))
                forwards.append(_run_forwards(bare, calls))
                again.append(_run_forwards(bare, calls))
                bar.update()
            rows += [
                _measurement(name, len(calls), [seconds[name] for seconds in taken], forwards, again)
                for name in taken[0]
            ]
        values = {"rows": [dataclasses.asdict(row) for row in rows], "rounds": rounds, **settings}
        return write_result(output, values)


def _run_eval(settings: dict[str, Any], folder: Path, device: torch.device) -> dict[str, float]:
    from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness  # slow to import, as the next ones
    from symphony_hf.evaluation.robustness.settings import RobustnessSettings

    started = clock(device)
    evaluate_robustness(RobustnessSettings(**settings, output=str(folder)))
    return {"eval": clock(device) - started}


def _run_routing(settings: dict[str, Any], folder: Path, device: torch.device) -> dict[str, float]:
    from symphony_hf.evaluation.routing.observe import observe_routing
    from symphony_hf.evaluation.routing.pictures import draw_observation
    from symphony_hf.evaluation.routing.settings import RoutingSettings

    started = clock(device)
    result = observe_routing(RoutingSettings(**settings, output=str(folder)))
    observed = clock(device)
    draw_observation(result, folder)
    return {"routing": observed - started, "routing and its pictures": clock(device) - started}


@contextlib.contextmanager
def noted_calls() -> Iterator[list[dict[str, Any]]]:
    """Note the arguments of every forward of the models that evaluations load within the context."""
    calls: list[dict[str, Any]] = []

    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    ModelUnderTest.on_load = lambda model: model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        ModelUnderTest.on_load = None


@torch.inference_mode()
def _run_forwards(model: PreTrainedModel, calls: Sequence[dict[str, Any]]) -> float:
    """Run a model with all arguments. Returns the seconds."""
    started = clock(model.device)
    for arguments in calls:
        model(**arguments)
    return clock(model.device) - started


def _measurement(
    command: str, number: int, taken: list[float], forwards: list[float], again: list[float]
) -> EvaluationMeasurement:
    low, ratio, high = quartiles([mine / bare for mine, bare in zip(taken, forwards, strict=True)])
    noise_low, noise, noise_high = quartiles([second / first for second, first in zip(again, forwards, strict=True)])
    _, seconds, _ = quartiles(taken)
    _, forward_seconds, _ = quartiles(forwards)
    return EvaluationMeasurement(
        command, number, seconds, forward_seconds, ratio, low, high, noise, noise_low, noise_high
    )


def evaluation_table(result: dict[str, Any]) -> Table:
    """Return the measurements of a result as a table."""
    header = ["command", "forwards", "command, s", "forwards, s", "ratio", "quartiles", "noise", "quartiles"]
    rows = [
        [
            row["command"],
            number_cell(row["forwards"], "d"),
            number_cell(row["seconds"], ".2f"),
            number_cell(row["forward_seconds"], ".2f"),
            number_cell(row["ratio"], ".3f"),
            range_cell(row["low"], row["high"], ".3f"),
            number_cell(row["noise"], ".3f"),
            range_cell(row["noise_low"], row["noise_high"], ".3f"),
        ]
        for row in result["rows"]
    ]
    return Table(f"{result['model']}, beside the bare forwards that the command needs", header, rows)


def print_bench_evaluation(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the measurements, and the path of their file."""
    print_result(result, [evaluation_table(result)], console)
