"""The command `symphony`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from .errors import ConfigError, SymphonyError

# Large blocks are kept instead of handed back to the system at every step; on CPU this is a large part of a step.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

app = typer.Typer(
    help="Symphony routing for Hugging Face MoE models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog="Example: symphony quickstart --output my-first-run --seed 1")
def quickstart(
    output: Annotated[str, typer.Option(help="Folder for checkpoints, report and pictures.")] = "symphony-quickstart",
    data: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time, on Python 3.10 too
        typer.Option(help="Text file, folder, or Hub data set, instead of the Python library's own sources."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches, attack and bootstrap.")] = 0,
    pretrain_steps: Annotated[int, typer.Option("--pretrain_steps", help="Optimizer steps of the base model.")] = 600,
    finetune_steps: Annotated[int, typer.Option("--finetune_steps", help="Optimizer steps of each copy.")] = 300,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sequences a step.")] = 16,
    block_size: Annotated[int, typer.Option("--block_size", help="Tokens a sequence.")] = 128,
    vocab_size: Annotated[int, typer.Option("--vocab_size", help="Of the tokenizer.")] = 2048,
    documents: Annotated[int, typer.Option(help="Held-out documents to evaluate on.")] = 60,
    attack_rate: Annotated[float, typer.Option("--attack_rate", help="Share of a line's words replaced.")] = 0.015,
) -> None:
    """Train a small MoE with and without its expert graph on real text, and compare: minutes, on a CPU."""
    from .quickstart import QuickstartSettings, run_quickstart
    from .report import print_report

    settings = QuickstartSettings(
        output=output,
        data=data,
        seed=seed,
        pretrain_steps=pretrain_steps,
        finetune_steps=finetune_steps,
        batch_size=batch_size,
        block_size=block_size,
        vocab_size=vocab_size,
        documents=documents,
        attack_rate=attack_rate,
    )
    print_report(run_quickstart(settings))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: symphony train recipes/quickstart/config.yaml --max_steps 2 --symphony.strength 0",
)
def train(context: typer.Context, recipe: Annotated[str, typer.Argument(help="A recipe's YAML file.")]) -> None:
    """Train what a recipe says; any setting can be overridden by name. For several processes use accelerate launch."""
    from .train import main as train_main

    raise typer.Exit(train_main([recipe, *context.args]))


@app.command(epilog="Example: symphony bench --models olmoe-1b-7b --tokens 1024 --output bench.json")
def bench(
    models: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="mixtral-8x7b, olmoe-1b-7b or qwen3-30b-a3b; several times for several; all by default."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one forward.")] = 1024,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, ...; the accelerator where there is one.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], typer.Option(help="float32 or bfloat16; float32 on CPU, else bfloat16.")] = None,  # noqa: UP045
    seconds: Annotated[float, typer.Option(help="Time for each row, after warm-up.")] = 60.0,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench.json",
) -> None:
    """Measure what the graph costs: a Symphony block against the stock one, in alternation, at true layer shapes."""
    from .bench import print_bench, run_bench

    print_bench(run_bench(models or None, tokens=tokens, device=device, dtype=dtype, seconds=seconds, output=output))


@app.command("bench-commit", epilog="Example: symphony bench-commit --output commit.json")
def bench_commit(
    seconds: Annotated[float, typer.Option(help="Time for the training step that commits are set beside.")] = 20.0,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench-commit.json",
) -> None:
    """Measure what moving the graphs costs with 1, 2 and 4 processes: one all-reduce an optimizer step."""
    from .bench_commit import print_bench_commit, run_bench_commit

    print_bench_commit(run_bench_commit(output, seconds))


check_app = typer.Typer(no_args_is_help=True, help="Checks that take minutes, and print what they found.")
app.add_typer(check_app, name="check")


@check_app.callback()
def check() -> None:
    """Checks that take minutes, and print what they found."""


@check_app.command(epilog="Example: symphony check distributed")
def distributed(
    only: Annotated[Optional[str], typer.Option(help="A part of the arrangements' names, such as ZeRO.")] = None,  # noqa: UP045
) -> None:
    """Train in many arrangements (accumulation, ranks, ZeRO, checkpointing, ...), which must give the same."""
    from .training.invariance import ARRANGEMENTS, compare, print_comparisons

    names = [name for name in ARRANGEMENTS if only is None or only.lower() in name.lower()]
    if not names:
        raise ConfigError(
            f"symphony check distributed: no arrangement has {only!r} in its name: {', '.join(ARRANGEMENTS)}"
        )
    comparisons = compare(names)
    print_comparisons(comparisons)
    raise typer.Exit(0 if all(row.holds for row in comparisons) else 1)


@app.command(epilog="Example: symphony families mixtral olmoe --check")
def families(
    names: Annotated[Optional[list[str]], typer.Argument(help="Model types; all by default.")] = None,  # noqa: UP045
    check: Annotated[bool, typer.Option("--check", help="Run every check on each: about a second a family.")] = False,
    readme: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A page to write the table into, between its marks; with --check and no names."),
    ] = None,
) -> None:
    """What symphonize can do for the MoE families of the installed transformers; exits with 1 if a check fails."""
    from .conformance.matrix import known_families, run_matrix
    from .conformance.table import print_rows, write_readme

    if readme is not None and (names or not check):
        raise ConfigError("symphony families: --readme needs --check, and all families")
    rows = run_matrix(known_families(names), check)
    print_rows(rows)
    if readme is not None:
        write_readme(Path(readme), rows)
    raise typer.Exit(1 if any(row.failures for row in rows) else 0)


def _restart_with_allocator_settings() -> None:
    """glibc reads its settings when a process starts, so start this command once more with them."""
    if sys.platform != "linux" or any(name in os.environ for name in _ALLOCATOR):
        return
    os.execve(sys.executable, [sys.executable, "-m", "symphony_hf.cli", *sys.argv[1:]], {**os.environ, **_ALLOCATOR})


def main() -> None:
    """The console script: errors of ours are one line, not a traceback."""
    if not {"-h", "--help"} & set(sys.argv):
        _restart_with_allocator_settings()
    try:
        app()
    except SymphonyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
