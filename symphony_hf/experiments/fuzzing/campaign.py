"""The fuzzing campaign: tampered files, loaded in a monitored process that may crash, hang or exhaust memory."""

import collections
import contextlib
import itertools
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from symphony_hf.checkpoints.untrusted import load_checkpoint
from symphony_hf.conversion.adapters.loading import load_adapter
from symphony_hf.errors import EvaluationError, SymphonyError
from symphony_hf.patching.expert_graph import ExpertGraph, active_graph
from symphony_hf.patching.symphonize import symphony_routers
from symphony_hf.routing.graph import adjacency_problems, initial_adjacency
from symphony_hf.settings import check_least
from symphony_hf.tables import Table, TableCell

from .mutations import MUTATIONS
from .specimens import SPECIMENS, make_base, make_specimens

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryPeak:
    """Context manager that measures peak memory growth, in bytes. Linux only; elsewhere `taken` stays 0."""

    taken = 0

    def __enter__(self) -> "MemoryPeak":
        if sys.platform == "linux":
            _CLEAR.write_text("5")  # resets the peak
            self._before = _kilobytes("VmRSS")
        return self

    def __exit__(self, *error: Any) -> None:
        if sys.platform == "linux":
            self.taken = 1024 * max(0, _kilobytes("VmHWM") - self._before)


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {name}")


MOST_SECONDS = 10.0
"""Time limit of a case, which takes some hundredths of a second on an idle core."""
_START_SECONDS = 120.0
"""Time limit of the process's start, which imports torch and loads each specimen."""
ALLOWANCE = 32 * 2**20
"""Bytes that a case may use beyond twice the size of its files, for modules and configs."""

Verdict = Literal["loaded", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """Result of a case, whose number determines its files together with the seed.

    `verdict` is `loaded` with valid graphs, `refused` by a SymphonyError, or `failed` in any other way; `detail` is the
    error, or the problems found.
    """

    case: int
    specimen: str
    target: str
    change: str
    verdict: Verdict
    detail: str = ""


class _OutOfTime(BaseException):
    """A timeout. Not an Exception, so that no loader takes it for a broken file."""


def try_case(case: int, seed: int, specimens: Path) -> Outcome:
    """Tamper with a copy of a specimen of `make_specimens`, load it, and judge the outcome."""
    rng = random.Random(f"{seed}/{case}")
    specimen = rng.choice(SPECIMENS)
    target = rng.choice(sorted(MUTATIONS[specimen]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(specimens / specimen, Path(scratch) / specimen))
        change = MUTATIONS[specimen][target](folder, rng)
        size = sum(file.stat().st_size for file in folder.iterdir())
        verdict, detail = _judge(folder, specimen, 2 * size + ALLOWANCE)
    return Outcome(case, specimen, target, change, verdict, detail)


def _judge(folder: Path, specimen: str, most_bytes: int) -> tuple[Verdict, str]:
    """Load a checkpoint within the limits. Any error but a SymphonyError is a failure."""
    base = _base_of(specimen)
    try:
        with _limited(MOST_SECONDS), MemoryPeak() as memory:
            model = _load(folder, base)
    except SymphonyError as error:
        verdict, detail = _refusal(error)
    except _OutOfTime:
        return "failed", f"not done after {MOST_SECONDS:g} seconds"
    except Exception as error:  # noqa: BLE001 - finding such errors is the purpose
        return "failed", f"{type(error).__name__}: {error}"
    else:
        problems = _problems(model)
        verdict, detail = ("failed", "; ".join(problems)) if problems else ("loaded", "")
    if memory.taken > most_bytes:
        return "failed", f"{memory.taken:,} bytes of memory, where {most_bytes:,} are allowed"
    return verdict, detail


def _base_of(specimen: str) -> PreTrainedModel | None:
    return make_base() if specimen == "adapter" else None


def _load(folder: Path, base: PreTrainedModel | None) -> torch.nn.Module:
    """Load a checkpoint, or an adapter onto its base, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_checkpoint(folder) if base is None else load_adapter(base, folder)


def _refusal(error: SymphonyError) -> tuple[Verdict, str]:
    """Accept a refusal unless it came from running out of memory."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    message = f"{type(error).__name__}: {error}"
    tried = any("allocate" in str(one) or isinstance(one, MemoryError) for one in chain)
    return ("failed", f"tried to allocate: {message}") if tried else ("refused", message)


def _problems(model: torch.nn.Module) -> list[str]:
    """Return the problems of a loaded model's graphs and transition matrices."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ExpertGraph)}
    problems = [] if found else ["loaded without graphs"]
    for name, graph in found.items():
        if graph.adjacency.dtype != torch.float32:
            problems.append(f"{name}: of type {graph.adjacency.dtype}")
        problems += [f"{name}: {problem}" for problem in adjacency_problems(graph.adjacency, graph.num_experts)]
        transition_EE = graph.transition().detach()
        is_signed = graph.config.strength < 0 or graph.config.normalization == "centred"
        if not torch.isfinite(transition_EE).all() or (not is_signed and (transition_EE < 0).any()):
            problems.append(f"{name}: routes by a matrix that is not finite, or negative somewhere")
        elif graph.config.normalization == "row" and (transition_EE.sum(-1) - 1).abs().max() > 1e-4:
            problems.append(f"{name}: routes by a matrix whose rows do not sum to 1")
    for name, router in symphony_routers(model):
        graph = active_graph(router.symphony)
        if torch.equal(graph.adjacency, initial_adjacency(graph.num_experts, graph.top_k)):
            problems.append(f"{name}: the stored graph is lost")  # no change of a file writes an initial graph
    return problems


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(cases: int = 10_000, seed: int = 0) -> list[Outcome]:
    """Run cases in a child process, which is restarted when a case ends it.

    Args:
        cases: Number of files to tamper with.
        seed: Random seed; it gives the same cases on every machine.

    Returns:
        The outcomes, in order.

    Raises:
        ConfigError: If `cases` is below 1.
        EvaluationError: If the child process does not get to its first case.
    """
    check_least("check fuzz", 1, cases=cases)
    outcomes: list[Outcome] = []
    progress = tqdm(total=cases, desc="Fuzzing", unit=" cases", delay=2, disable=None)
    with tempfile.TemporaryDirectory() as scratch, progress as bar:
        make_specimens(Path(scratch))
        while len(outcomes) < cases:
            for outcome in _in_a_process(range(len(outcomes), cases), seed, Path(scratch)):
                outcomes.append(outcome)
                bar.update()
    return outcomes


def _in_a_process(cases: range, seed: int, specimens: Path) -> Iterator[Outcome]:
    """Yield outcomes up to and including the first case that the process does not survive.

    Raises:
        EvaluationError: If the process does not get to its first case: another one would not, either.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, cases, seed, specimens), daemon=True)
    process.start()
    there.close()
    try:
        if problem := _received(here, process, _START_SECONDS):
            raise EvaluationError(
                f"check fuzz: {problem} before its first case: its error is printed above, unless it was killed"
            )
        for case in cases:
            outcome = _received(here, process, 3 * MOST_SECONDS)
            if isinstance(outcome, str):
                yield Outcome(case, "", "", "", "failed", outcome)
                return
            yield outcome
    finally:
        process.kill()
        process.join()


def _received(here: Connection, process: BaseProcess, seconds: float) -> Any:
    """Return what the process sends next; as text, why it sends nothing."""
    if not here.poll(seconds):
        return "the process hangs and ignores signals"
    try:
        return here.recv()
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"


def _work(connection: Connection, cases: range, seed: int, specimens: Path) -> None:
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for specimen in SPECIMENS:  # untouched, so that no case's memory has the modules that a first load imports
        _load(specimens / specimen, _base_of(specimen))
    connection.send(None)  # ready
    for case in cases:
        connection.send(try_case(case, seed, specimens))


def print_outcomes(outcomes: list[Outcome], console: Console | None = None) -> None:
    """Print the number of each verdict, and every failure."""
    console = console or Console()
    verdicts: tuple[Verdict, ...] = ("loaded", "refused", "failed")
    rows = []
    ordered = sorted(outcomes, key=lambda outcome: (outcome.specimen, outcome.target))
    for key, group in itertools.groupby(ordered, key=lambda outcome: (outcome.specimen, outcome.target)):
        counts = collections.Counter(outcome.verdict for outcome in group)
        rows.append([*key, *(TableCell(str(counts[verdict]), counts[verdict]) for verdict in verdicts)])
    Table(f"{len(outcomes):,} tampered files", ["specimen", "changed", *verdicts], rows).print(console)
    for outcome in outcomes:
        if outcome.verdict == "failed":
            where = f"case {outcome.case} ({outcome.specimen}, {outcome.target}, {outcome.change})"
            console.print(f"{where}: {outcome.detail}", highlight=False, markup=False, soft_wrap=True)
