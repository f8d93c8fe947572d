"""Running a study: one process per run, with a number of parallel workers, and the report at the end."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import platform
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from symphony_hf.errors import ConfigError, SymphonyError
from symphony_hf.experiments.bench.timing import using_threads
from symphony_hf.files import replacing
from symphony_hf.patching.symphonize import expert_graphs
from symphony_hf.results import check_results

from .cells import (
    VERSIONS,
    Results,
    StudyRun,
    all_cells,
    cells_of,
    chosen_rates,
    describe_plan,
    pretraining_of,
    relative_cost,
    tuning_cells,
)
from .measure import DivergedError, measure, read_stream
from .model import build_model
from .report import CURVES, GRAPHS, PAGE, POINTS, write_ablation
from .study import Study, load_study, parse_changes
from .text import StudyText, contaminated, prepare_streams, read_streams
from .train import train

_TRIAL_STEPS = 4


def run_ablation(
    study: Study | str | Path,
    output: str | Path,
    *,
    workers: int | None = None,
    changes: Sequence[str] = (),
    report_only: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run the unfinished runs of a study, and write its report.

    Args:
        study: A study's YAML file: a recipe, axes, seeds.
        output: Folder for the finished runs and the report.
        workers: Number of runs in parallel, one thread each; by default one per core.
        changes: Setting of the recipe or of `pretraining` to change, NAME=VALUE, such as max_steps=100 or
            data.path=my-text; may be repeated.
        report_only: Only report the finished runs.
        dry_run: Print the plan and an estimate of its time.

    Returns:
        The values of `report.json`; with `dry_run`, the lines of the plan.

    Raises:
        ConfigError: If `workers` is below 1, the study cannot be read, or the folder has the report of another command,
            or with `report_only`, no finished run of the study but pre-training.
        DataError: If the text does not exist or is too short, or its attack changes nothing.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"ablation: `workers` must be at least 1, got {workers}")
    if not isinstance(study, Study):
        study = load_study(study, parse_changes(changes))
    output = Path(output)
    check_results(output / "report.json", (PAGE, CURVES, GRAPHS, POINTS), "ablate", ("cells", "machines"))
    text = prepare_streams(study, output)
    results = Results(output, study, text.digest)
    if dry_run:
        return {"plan": describe_plan(study, results, _seconds_per_cell(study, results, text), workers)}
    if report_only:
        _check_finished(study, results)
    return write_ablation(study, results, {} if report_only else _run_stages(study, results, workers))


def _check_finished(study: Study, results: Results) -> None:
    """Refuse a report of nothing, which would replace an earlier one: the runs are those of other settings, if any."""
    tuning_runs = tuning_cells(study)
    if any(map(results.has, [*cells_of(study, chosen_rates(study, results)), *tuning_runs])):
        return
    tuning = f", and none of its {len(tuning_runs)} runs that choose learning rates" if tuning_runs else ""
    num_files = len(list(results.folder.glob("cells/*.json")))
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    raise ConfigError(
        f"ablation: no judged run of this study in `{results.folder}` is finished{tuning}; finished runs there, of any "
        f"study: {num_files}. A run is found by its point, seed, text with its attack, model, symphony settings, "
        "learning rate, warm-up, steps, batch and block size, contamination, pre-training, and versions (here "
        f"{versions}): give every `--set` that it was run with, or leave out `--report` to run the study"
    )


def _run_stages(study: Study, results: Results, workers: int) -> dict[StudyRun, str]:
    """Run what is not done yet of each stage: pre-training, tuning, judging. Returns the errors of failed runs."""
    failed: dict[StudyRun, str] = {}
    for cells_of_stage in (tuning_cells, lambda study: cells_of(study, chosen_rates(study, results))):
        cells = [cell for cell in cells_of_stage(study) if results.load(cell) is None]
        first = dict.fromkeys(run for cell in cells if (run := pretraining_of(study, cell)) is not None)
        waiting = [run for run in first if not results.has(run)]
        failed |= _run_cells(study, results, waiting, workers)
        failed |= _run_cells(study, results, [c for c in cells if pretraining_of(study, c) not in failed], workers)
    return failed


def run_cell(study: Study, cell: StudyRun, text: StudyText, results: Results | None = None) -> dict[str, Any]:
    """Train and measure one run in this process.

    Args:
        study: The study.
        cell: The run.
        text: The study's text.
        results: Results with the checkpoint that the run starts from or writes; needed with pre-training.
    """
    torch.manual_seed(cell.seed)
    first = pretraining_of(study, cell)
    assert (first is None and cell.stage != "pretrain") or results is not None
    checkpoint = None if first is None or results is None else results.checkpoint(first)
    model = build_model(study.recipe, cell.point, text.vocab_size, checkpoint)
    if cell.stage == "pretrain":
        assert study.pretraining is not None
        assert text.pretrain is not None
        stream, steps = text.pretrain, study.pretraining.max_steps
    else:
        stream, steps = contaminated(study, text), study.steps
    trained = train(model, study, cell.point, cell.seed, stream, rate=cell.rate, steps=steps)
    started = time.perf_counter()
    if cell.stage == "judge":
        measured = _judged(model, study, text)
    else:
        measured = {"validation_loss": _validation_loss(model, study, text)}
        if cell.stage == "pretrain" and results is not None:
            _save_plain(model, results.checkpoint(cell))
    return {
        **trained,
        **measured,
        "stage": cell.stage,
        "learning_rate": cell.rate or study.learning_rate,
        "measure_seconds": time.perf_counter() - started,
        "machine": _machine(),
        "tokens": study.tokens // study.steps * steps,
        "tokens_per_cpu_second": study.tokens // study.steps * steps / trained["train_cpu_seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": text.vocab_size,
    }


def _judged(model: PreTrainedModel, study: Study, text: StudyText) -> dict[str, Any]:
    """Return the measures and the graphs of a judged run; `diverged` alone if its training diverged."""
    try:
        measured = measure(model, text, study.recipe.data.block_size)
    except DivergedError:
        return {"diverged": True}
    return {**measured, "graphs": {name: graph_EE.tolist() for name, graph_EE in expert_graphs(model).items()}}


def _validation_loss(model: PreTrainedModel, study: Study, text: StudyText) -> float | None:
    """Return the loss on held-out training text, in nats; None if the training diverged."""
    try:
        return read_stream(model, text.validation, study.recipe.data.block_size).loss
    except DivergedError:
        return None


def _save_plain(model: PreTrainedModel, path: Path) -> None:
    """Write the weights of a model, without its graphs, as its plain form has them."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".symphony." not in name}
    with replacing(path) as written:
        save_file(weights, written)


def _seconds_per_cell(study: Study, results: Results, text: StudyText) -> float:
    """Estimate the seconds of a run from the finished ones, or from a few steps at the base point."""
    cells = all_cells(study, chosen_rates(study, results))
    done = {cell: values for cell in cells if (values := results.load(cell)) is not None}
    if done:
        seconds = sum(values["train_seconds"] + values["measure_seconds"] for values in done.values())
        return seconds / sum(relative_cost(study, cell) for cell in done)
    train_settings = {**study.recipe.train, "max_steps": _TRIAL_STEPS}
    trial = dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, train=train_settings))
    with using_threads(1), torch.random.fork_rng(devices=[]):  # one thread, as in each run
        torch.manual_seed(0)
        model = build_model(trial.recipe, study.base, text.vocab_size)
        train(model, trial, study.base, 0, text.train)  # warm-up
        seconds = train(model, trial, study.base, 0, text.train)["train_seconds"] / trial.tokens
    # A forward without gradients takes about a third of a training step.
    return seconds * (study.tokens + (len(text.validation) + (1 + len(text.attacked)) * len(text.test)) / 3)


def _run_cells(study: Study, results: Results, cells: Sequence[StudyRun], workers: int) -> dict[StudyRun, str]:
    """Run in child processes. Returns the errors of failed runs."""
    context = multiprocessing.get_context("forkserver")
    # Each run imports the main script again: what that needs of this package is imported once, by the process from
    # which the others are forked. Preloading `__main__` has no effect: Python 3.11's server never gets its path.
    context.set_forkserver_preload([name for name in sys.modules if name.partition(".")[0] == "symphony_hf"])
    waiting, failed = list(cells), dict[StudyRun, str]()
    if not waiting:
        return failed
    running: dict[BaseProcess, StudyRun] = {}
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or "1"  # each run has one thread; torch reads it when it is imported
    with tqdm(total=len(cells), desc=f"ablation, {cells[0].stage}", unit=" runs", disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    process = context.Process(target=_work, args=(study, cell, results))
                    process.start()
                    running[process] = cell
                multiprocessing.connection.wait([process.sentinel for process in running])
                for ended in [process for process in running if not process.is_alive()]:
                    cell = running.pop(ended)
                    ended.join()
                    if not results.has(cell):
                        failed[cell] = _last_words(results.log(cell), ended.exitcode)
                    bar.update()
        finally:
            for left in running:
                left.terminate()
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
    return failed


def _work(study: Study, cell: StudyRun, results: Results) -> None:
    """Execute a run in its process, with its output in its log."""
    log = results.log(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        text = read_streams(results.folder, results.text_digest)
        results.save(cell, run_cell(study, cell, text, results))
    except SymphonyError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def _last_words(log: Path, code: int | None) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'} (logs/{log.name})"


def _machine() -> dict[str, Any]:
    """Return the versions and the machine of a run."""
    return {
        **VERSIONS,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
