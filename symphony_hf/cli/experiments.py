"""`symphony bench` and its kin, `ablate`, `check`, `evidence`, `families` and `theory`."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from symphony_hf.errors import ConfigError
from symphony_hf.experiments.bench.commit import print_bench_commit, run_bench_commit
from symphony_hf.experiments.bench.experts import print_bench_experts, run_bench_experts
from symphony_hf.experiments.bench.layer import print_bench, run_bench
from symphony_hf.experiments.bench.upcycle import print_bench_upcycle, run_bench_upcycle
from symphony_hf.experiments.full_size import print_full_size, run_full_size
from symphony_hf.experiments.fuzzing.campaign import Outcome, print_outcomes
from symphony_hf.experiments.fuzzing.campaign import fuzz as run_campaign

from .app import app, command_from


@app.command(epilog="Example: symphony bench --models olmoe-1b-7b --tokens 1024 --output bench.json")
@command_from(run_bench, arguments=(), repeated=("models",))
def bench(result: dict[str, Any]) -> None:
    """Measure what the graph costs: a Symphony block against the stock one, in alternation, at true layer shapes."""
    print_bench(result)


@app.command("bench-commit", epilog="Example: symphony bench-commit --output commit.json")
@command_from(run_bench_commit, left_out=("processes", "sizes"))
def bench_commit(result: dict[str, Any]) -> None:
    """Measure what moving the graphs costs with 1, 2 and 4 processes: one all-reduce per optimizer step."""
    print_bench_commit(result)


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
    epilog="Examples: symphony ablate recipes/wikitext103-216m/ablation/pairs.yaml --output runs/pairs --- "
    "symphony ablate STUDY.yaml --output DIR --set max_steps=100 --set data.path=my-text --dry_run",
)
def ablate(
    study: Annotated[str, typer.Argument(help="A study's YAML file: a recipe, axes, seeds.")],
    output: Annotated[str, typer.Option(help="Folder for the finished runs and the report.")],
    workers: Annotated[
        int | None, typer.Option(help="Number of runs in parallel, one thread each; by default one per core.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the recipe, NAME=VALUE; may be repeated.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only report the finished runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print the plan and an estimate of its time.")] = False,
) -> None:
    """Run a grid of small training runs around a base point, and report it with intervals over seeds.

    Each run is a process and a file of its own: an interrupted study resumes with the same command.
    """
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the runs; torch reads it when it is imported

    from symphony_hf.experiments.ablation.report import print_ablation
    from symphony_hf.experiments.ablation.run import run_ablation
    from symphony_hf.experiments.ablation.study import load_study

    chosen = load_study(study, _changes(changes or []))
    values = run_ablation(chosen, output, workers=workers, dry_run=dry_run, report_only=report)
    print_ablation(values)
    if values.get("failed"):
        raise typer.Exit(1)


def _changes(texts: list[str]) -> dict[str, Any]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"symphony ablate: --set takes NAME=VALUE, got {text!r}")
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in texts)}


check_app = typer.Typer(no_args_is_help=True, help="Checks that take minutes.")
app.add_typer(check_app, name="check")


@check_app.callback()
def check() -> None:
    """Checks that take minutes."""


@check_app.command(epilog="Example: symphony check distributed")
def distributed(
    only: Annotated[
        str | None, typer.Option(help="Only arrangements with this text in their names, such as ZeRO.")
    ] = None,
) -> None:
    """Train in many arrangements (accumulation, ranks, ZeRO, checkpointing, ...), which must give the same."""
    from symphony_hf.experiments.distributed.arrangements import ARRANGEMENTS
    from symphony_hf.experiments.distributed.invariance import compare, print_comparisons

    names = [name for name in ARRANGEMENTS if only is None or only.lower() in name.lower()]
    if not names:
        raise ConfigError(
            f"symphony check distributed: no arrangement has {only!r} in its name: {', '.join(ARRANGEMENTS)}"
        )
    comparisons = compare(names)
    print_comparisons(comparisons)
    raise typer.Exit(0 if all(row.holds for row in comparisons) else 1)


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
    epilog="Example: symphony evidence --ablation runs/ablation --theory symphony-theory, in the project's folder",
)
def evidence(
    folder: Annotated[str, typer.Option(help="Folder of the result files.")] = "recipes/evidence",
    page: Annotated[str, typer.Option(help="Page to write.")] = "recipes/EVIDENCE.md",
    ablation: Annotated[str | None, typer.Option(help="Output folder of `symphony ablate` to add.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Output folder of the three pairs, if they were run at another size.")
    ] = None,
    about: Annotated[str | None, typer.Option(help="One sentence that describes the text of the studies.")] = None,
    theory: Annotated[str | None, typer.Option(help="Output folder of `symphony theory` to add.")] = None,
) -> None:
    """Write the page of evidence from result files, next to the paper's numbers, after adding new results."""
    from symphony_hf.experiments.evidence.results import add_results, write_evidence

    add_results(folder, about, pairs=pairs, ablation=ablation, theory=theory)
    typer.echo(f"Written to {write_evidence(folder, page).resolve()}")


@app.command(epilog="Example: symphony families mixtral olmoe --check")
def families(
    names: Annotated[list[str] | None, typer.Argument(help="Model types; all by default.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run all checks on each family: about a second per family.")
    ] = False,
    readme: Annotated[
        str | None,
        typer.Option(help="A page to write the table into, between its marks; with --check and no names."),
    ] = None,
) -> None:
    """List what symphonize supports for each MoE family of the installed transformers. Exit with 1 if one fails."""
    from symphony_hf.experiments.conformance.matrix import known_families, run_matrix
    from symphony_hf.experiments.conformance.table import print_rows, write_readme

    if readme is not None and (names or not check):
        raise ConfigError("symphony families: --readme needs --check, and all families")
    rows = run_matrix(known_families(names), check)
    print_rows(rows)
    if readme is not None:
        write_readme(Path(readme), rows)
    raise typer.Exit(1 if any(row.failures for row in rows) else 0)


@app.command(epilog="Example: symphony theory --output theory --seeds 10")
def theory(
    output: Annotated[str, typer.Option(help="Folder of theory.json and the pictures.")] = "symphony-theory",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 5,
    experts: Annotated[int, typer.Option(help="Number of experts.")] = 16,
    communities: Annotated[int, typer.Option(help="Number of expert communities.")] = 4,
    within: Annotated[
        float, typer.Option(help="Probability that a token's two experts are in the same community.")
    ] = 0.9,
) -> None:
    """Recover a planted graph: how fast it is learned, and how much routing by it gains under noise."""
    from symphony_hf.experiments.theory.benchmark import TheorySettings, run_theory
    from symphony_hf.experiments.theory.report import print_theory

    settings = TheorySettings(
        output=output, seeds=range(seeds), num_experts=experts, num_communities=communities, within=within
    )
    print_theory(run_theory(settings))
