"""A study from its plan to its report: one process a cell, as many at a time as there are workers."""

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
from tqdm import tqdm
from transformers.utils import logging

from symphony_hf.errors import ConfigError, SymphonyError
from symphony_hf.files import check_file_place
from symphony_hf.patching.symphonize import expert_graphs

from .cells import VERSIONS, Cell, Results, cells_of, describe_plan
from .measure import measure
from .report import write_ablation
from .study import Study
from .text import StudyText, prepare_streams, read_streams
from .train import build_model, train

_TRIAL_STEPS = 4


def run_ablation(
    study: Study, output: str | Path, *, workers: int | None = None, dry_run: bool = False, report_only: bool = False
) -> dict[str, Any]:
    """Run what is not there yet of a study, and report all of it.

    Args:
        study: What is run.
        output: Folder of the finished cells, their logs, and the report.
        workers: Cells at a time, a thread each; as many as there are cores when None.
        dry_run: Only say what would be run, and how long it would take by a trial of a few steps.
        report_only: Run nothing, and report what is there.

    Returns:
        The report's values, as in `report.json`; with `dry_run` the lines of the plan.

    Raises:
        ConfigError: If `workers` is below 1.
        DataError: If there is no such text, or too little of it.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"ablation: `workers` must be at least 1, got {workers}")
    output = Path(output)
    check_file_place(output / "report.json", "ablate")
    text = prepare_streams(study.recipe, output)
    results = Results(output, study, text.digest)
    if dry_run:
        return {"plan": describe_plan(study, results, _seconds_per_cell(study, results, text), workers)}
    waiting = [cell for cell in cells_of(study) if results.load(cell) is None and not report_only]
    failed = _run_cells(study, results, waiting, workers)
    return write_ablation(study, results, failed)


def run_cell(study: Study, cell: Cell, text: StudyText) -> dict[str, Any]:
    """Train and measure one cell in this process."""
    torch.manual_seed(cell.seed)
    model = build_model(study, cell.point, text.vocab_size)
    trained = train(model, study, cell.point, cell.seed, text.train)
    started = time.perf_counter()
    measured = measure(model, text, study.recipe.data.block_size)
    return {
        **trained,
        **measured,
        "measure_seconds": time.perf_counter() - started,
        "machine": _machine(),
        "tokens": study.tokens,
        "tokens_per_cpu_second": study.tokens / trained["train_cpu_seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "graphs": {name: adjacency_EE.tolist() for name, adjacency_EE in expert_graphs(model).items()},
    }


def _seconds_per_cell(study: Study, results: Results, text: StudyText) -> float:
    """Of cells that are done; by a few steps of the base point where none is."""
    done = [values for cell in cells_of(study) if (values := results.load(cell)) is not None]
    if done:
        return sum(values["train_seconds"] + values["measure_seconds"] for values in done) / len(done)
    train_settings = {**study.recipe.train, "max_steps": _TRIAL_STEPS}
    trial = dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, train=train_settings))
    torch.set_num_threads(1)  # as each cell has
    torch.manual_seed(0)
    model = build_model(trial, study.base, text.vocab_size)
    train(model, trial, study.base, 0, text.train)  # the first steps are slower
    seconds = train(model, trial, study.base, 0, text.train)["train_seconds"] / trial.tokens
    # Reading without gradients takes about a third of training.
    return seconds * (study.tokens + (len(text.validation) + 2 * len(text.test)) / 3)


def _run_cells(study: Study, results: Results, cells: Sequence[Cell], workers: int) -> dict[Cell, str]:
    """Run cells, and say why those that failed did."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the process that all others are forked from.
    context.set_forkserver_preload(["symphony_hf.experiments.ablation.run"])
    waiting, failed = list(cells), dict[Cell, str]()
    running: dict[BaseProcess, Cell] = {}
    with tqdm(total=len(cells), desc="ablation", unit=" cells", disable=None) as bar:
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
                    if results.load(cell) is None:
                        failed[cell] = _last_words(results.log(cell), ended.exitcode)
                    bar.update()
        finally:
            for left in running:
                left.terminate()
    return failed


def _work(study: Study, cell: Cell, results: Results) -> None:
    """A cell's process: a failure is its own, and what it says goes into its log."""
    log = results.log(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        text = read_streams(results.folder, results.text_digest)
        results.save(cell, run_cell(study, cell, text))
    except SymphonyError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def _last_words(log: Path, code: int | None) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'} (logs/{log.name})"


def _machine() -> dict[str, Any]:
    """What a cell was run by."""
    return {
        **VERSIONS,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
