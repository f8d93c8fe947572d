"""Benchmarks, ablations, checks and evidence: the commands for experiments."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from symphony_hf.errors import ConfigError

from .app import app


@app.command(epilog="Example: symphony bench --models olmoe-1b-7b --tokens 1024 --output bench.json")
def bench(
    models: Annotated[
        list[str] | None,
        typer.Option(help="mixtral-8x7b, olmoe-1b-7b or qwen3-30b-a3b; several times for several; all by default."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens in one forward pass.")] = 1024,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the accelerator where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; float32 on CPU, else bfloat16.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds per measurement, after warm-up.")] = 60.0,
    output: Annotated[str, typer.Option(help="JSON file to write.")] = "symphony-bench.json",
) -> None:
    """Measure what the graph costs: a Symphony block against the stock one, in alternation, at true layer shapes."""
    from symphony_hf.experiments.bench.layer import print_bench, run_bench

    print_bench(run_bench(models or None, tokens=tokens, device=device, dtype=dtype, seconds=seconds, output=output))


@app.command("bench-commit", epilog="Example: symphony bench-commit --output commit.json")
def bench_commit(
    seconds: Annotated[
        float, typer.Option(help="Seconds to measure the training step that commits are compared with.")
    ] = 20.0,
    output: Annotated[str, typer.Option(help="JSON file to write.")] = "symphony-bench-commit.json",
) -> None:
    """Measure what moving the graphs costs with 1, 2 and 4 processes: one all-reduce an optimizer step."""
    from symphony_hf.experiments.bench.commit import print_bench_commit, run_bench_commit

    print_bench_commit(run_bench_commit(output, seconds))


@app.command("bench-experts", epilog="Example: symphony bench-experts --images 4 --output experts.json")
def bench_experts(
    images: Annotated[int, typer.Option(help="Number of images in one step.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the accelerator where there is one.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds per measurement, after warm-up.")] = 30.0,
    output: Annotated[str, typer.Option(help="JSON file to write.")] = "symphony-bench-experts.json",
) -> None:
    """Measure UpcycledMoE against a loop over experts, at the shapes of LLaVA's projector and CLIP's MLP."""
    from symphony_hf.experiments.bench.experts import print_bench_experts, run_bench_experts

    print_bench_experts(run_bench_experts(output, images=images, device=device, seconds=seconds))


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

    Each cell is a process and a file of its own: stopped in any way, the same command goes on.
    """
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each cell; torch reads it when it is imported

    from symphony_hf.experiments.ablation.report import print_ablation
    from symphony_hf.experiments.ablation.run import run_ablation
    from symphony_hf.experiments.ablation.study import load_study

    chosen = load_study(study, _changes(changes or []))
    values = run_ablation(chosen, output, workers=workers, dry_run=dry_run, report_only=report)
    print_ablation(values)
    if values.get("failed"):
        raise typer.Exit(1)


def _changes(texts: list[str]) -> dict[str, Any]:
    from symphony_hf.errors import ConfigError

    for text in texts:
        if "=" not in text:
            raise ConfigError(f"symphony ablate: --set takes NAME=VALUE, got {text!r}")
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in texts)}


check_app = typer.Typer(no_args_is_help=True, help="Checks that take minutes, and print what they found.")
app.add_typer(check_app, name="check")


@check_app.callback()
def check() -> None:
    """Checks that take minutes, and print what they found."""


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
def full_size(
    model: Annotated[str, typer.Option(help="7.4b or 4.2b.")] = "7.4b",
    folder: Annotated[str, typer.Option(help="Folder for temporary files: 30 GB, or 18 GB for 4.2b.")] = ".",
    tokens: Annotated[int, typer.Option(help="Number of text tokens; an image adds 576.")] = 32,
    output: Annotated[str, typer.Option(help="JSON file to write.")] = "symphony-full-size.json",
) -> None:
    """Make, load, symphonize, run, save and load again one of the recipes' models at its true size."""
    from symphony_hf.experiments.full_size import print_full_size, run_full_size

    print_full_size(run_full_size(model, folder, tokens=tokens, output=output))


@check_app.command(epilog="Example: symphony check fuzz --cases 1000")
def fuzz(
    cases: Annotated[int, typer.Option(help="Number of files to tamper with.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Random seed; it gives the same cases on every machine.")] = 0,
) -> None:
    """Tamper with checkpoints and adapters: each must load with valid graphs, or raise a clear error."""
    from symphony_hf.experiments.fuzzing.campaign import fuzz as try_cases
    from symphony_hf.experiments.fuzzing.campaign import print_outcomes

    if cases < 1:
        raise ConfigError(f"symphony check fuzz: --cases must be at least 1, got {cases}")
    outcomes = try_cases(cases, seed)
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
