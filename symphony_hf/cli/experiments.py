"""`symphony bench` and its kin, `ablate`, `balance`, `check`, `evidence`, `families` and `theory`."""

from typing import Any

import typer

from symphony_hf.experiments.ablation.page import print_ablation
from symphony_hf.experiments.ablation.run import run_ablation
from symphony_hf.experiments.balancing.study import print_balance, run_balance
from symphony_hf.experiments.bench.commit import print_bench_commit, run_bench_commit
from symphony_hf.experiments.bench.evaluation import print_bench_evaluation, run_bench_evaluation
from symphony_hf.experiments.bench.experts import print_bench_experts, run_bench_experts
from symphony_hf.experiments.bench.layer import run_bench
from symphony_hf.experiments.bench.layer_rows import print_bench
from symphony_hf.experiments.bench.upcycle import print_bench_upcycle, run_bench_upcycle
from symphony_hf.experiments.conformance.matrix import FamilyResult
from symphony_hf.experiments.conformance.table import list_families, print_rows
from symphony_hf.experiments.distributed.invariance import Comparison, check_distributed, print_comparisons
from symphony_hf.experiments.evidence.results import WrittenFile, describe_files, write_evidence
from symphony_hf.experiments.full_size import print_full_size, run_full_size
from symphony_hf.experiments.fuzzing.campaign import Outcome, print_outcomes
from symphony_hf.experiments.fuzzing.campaign import fuzz as run_campaign
from symphony_hf.experiments.theory.benchmark import NO_OPTION, OPTIONS, TheorySettings, run_theory
from symphony_hf.experiments.theory.report import print_theory

from .app import app, command_from


@app.command(epilog="Example: symphony bench --models olmoe-1b-7b,qwen3-30b-a3b --tokens 1,64,1024 --output bench.json")
@command_from(run_bench, arguments=(), repeated=("models",))
def bench(result: dict[str, Any]) -> None:
    """Measure what the graph costs: a Symphony block against the stock one, in alternation, at true layer shapes."""
    print_bench(result)


@app.command("bench-commit", epilog="Example: symphony bench-commit --output commit.json")
@command_from(run_bench_commit, left_out=("processes", "sizes"))
def bench_commit(result: dict[str, Any]) -> None:
    """Measure what moving the graphs costs with 1, 2 and 4 processes: one all-reduce per optimizer step."""
    print_bench_commit(result)


@app.command("bench-evaluation", epilog="Example: symphony bench-evaluation runs/mine/final --threads 1")
@command_from(run_bench_evaluation, arguments=("model",))
def bench_evaluation(result: dict[str, Any]) -> None:
    """Measure `symphony eval` and `symphony routing` beside the bare forwards that they need."""
    print_bench_evaluation(result)


@app.command("bench-experts", epilog="Example: symphony bench-experts --images 4 --output experts.json")
@command_from(run_bench_experts)
def bench_experts(result: dict[str, Any]) -> None:
    """Measure UpcycledMoE against a loop over experts, at the shapes of LLaVA's projector and CLIP's MLP."""
    print_bench_experts(result)


@app.command("bench-upcycle", epilog="Example: symphony bench-upcycle --output upcycle.json")
@command_from(run_bench_upcycle)
def bench_upcycle(result: dict[str, Any]) -> None:
    """Measure upcycling at Phi-3-mini's shapes: memory, and seconds next to a plain copy of the same size."""
    print_bench_upcycle(result)


@app.command(
    epilog="Examples: symphony ablate recipes/wikitext103-216m/ablation/pairs.yaml --output runs/pairs\n\n"
    "symphony ablate STUDY.yaml --output DIR --set max_steps=100 --set data.path=my-text --dry_run",
)
@command_from(
    run_ablation,
    arguments=("study",),
    names={"changes": "set", "report_only": "report"},
    flags={"report_only": "--report", "dry_run": "--dry_run"},
    repeated=("changes",),
)
def ablate(values: dict[str, Any]) -> None:
    """Run a grid of small training runs around a base point, and report it with intervals over seeds.

    Each run is a process and a file of its own: an interrupted study resumes with the same command.
    """
    print_ablation(values)
    if values.get("failed"):
        raise typer.Exit(1)


@app.command(epilog="Example: symphony balance --output balance.json --seeds 3")
@command_from(run_balance)
def balance(result: dict[str, Any]) -> None:
    """Compare ways to balance experts: scopes of the loss on two domains, and the correction bias."""
    print_balance(result)


check_app = typer.Typer(no_args_is_help=True)
app.add_typer(check_app, name="check")


@check_app.callback()
def check() -> None:
    """Check the method: distributed training, full-size models, damaged checkpoints."""


@check_app.command(epilog="Example: symphony check distributed")
@command_from(check_distributed)
def distributed(comparisons: list[Comparison]) -> None:
    """Train in many arrangements (accumulation, ranks, ZeRO, checkpointing, ...), which must give the same."""
    print_comparisons(comparisons)
    has_compared = any(not row.skipped and row.name != row.reference for row in comparisons)
    raise typer.Exit(0 if has_compared and all(row.holds for row in comparisons) else 1)


@check_app.command("full-size", epilog="Example: symphony check full-size --model 7.4b --folder /data")
@command_from(run_full_size, arguments=(), left_out=("shrink",))
def full_size(result: dict[str, Any]) -> None:
    """Make, load, symphonize, run, save and load again one of the recipes' models at its true size."""
    print_full_size(result)


@check_app.command(epilog="Example: symphony check fuzz --cases 1000")
@command_from(run_campaign)
def fuzz(outcomes: list[Outcome]) -> None:
    """Tamper with checkpoints and adapters: each must load with valid graphs, or raise a clear error."""
    print_outcomes(outcomes)
    raise typer.Exit(1 if any(outcome.verdict == "failed" for outcome in outcomes) else 0)


@app.command(
    epilog="Example: symphony evidence --folder evidence --page EVIDENCE.md --pairs runs/pairs --about 'On my text.' "
    "--theory symphony-theory",
)
@command_from(write_evidence)
def evidence(files: list[WrittenFile]) -> None:
    """Write the page of evidence from result files, next to the paper's numbers, after adding new results."""
    typer.echo(describe_files(files))


@app.command(epilog="Example: symphony families mixtral olmoe --check")
@command_from(list_families, arguments=("names",), repeated=("names",), flags={"check": "--check"})
def families(rows: list[FamilyResult]) -> None:
    """List what symphonize supports for each MoE family of the installed transformers. Exit with 1 if one fails."""
    print_rows(rows)
    raise typer.Exit(1 if any(row.failures for row in rows) else 0)


@app.command(epilog="Example: symphony theory --output theory --seeds 10")
@command_from(TheorySettings, names=OPTIONS, left_out=NO_OPTION)
def theory(settings: TheorySettings) -> None:
    """Recover a planted graph: how fast it is learned, and how much routing by it gains under noise."""
    print_theory(run_theory(settings))
