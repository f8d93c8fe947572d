"""`symphony check ...`."""

from typing import Annotated

import typer

from ..errors import ConfigError
from .app import app

check_app = typer.Typer(no_args_is_help=True, help="Checks that take minutes, and print what they found.")
app.add_typer(check_app, name="check")


@check_app.callback()
def check() -> None:
    """Checks that take minutes, and print what they found."""


@check_app.command(epilog="Example: symphony check distributed")
def distributed(
    only: Annotated[str | None, typer.Option(help="A part of the arrangements' names, such as ZeRO.")] = None,
) -> None:
    """Train in many arrangements (accumulation, ranks, ZeRO, checkpointing, ...), which must give the same."""
    from ..training.invariance import ARRANGEMENTS, compare, print_comparisons

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
    folder: Annotated[
        str, typer.Option(help="Where 30 GB (18 GB for 4.2b) are written, and deleted at the end.")
    ] = ".",
    tokens: Annotated[int, typer.Option(help="Of the sequence; an image's 576 come on top.")] = 32,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-full-size.json",
) -> None:
    """Make, load, symphonize, run, save and load again one of the recipes' models at its true size."""
    from ..full_size import print_full_size, run_full_size

    print_full_size(run_full_size(model, folder, tokens=tokens, output=output))


@check_app.command(epilog="Example: symphony check fuzz --cases 1000")
def fuzz(
    cases: Annotated[int, typer.Option(help="How many files to tamper with.")] = 10_000,
    seed: Annotated[int, typer.Option(help="With it, a case is the same on every machine.")] = 0,
) -> None:
    """Tamper with checkpoints and adapters: each must load with valid graphs, or be refused in so many words."""
    from ..fuzzing import fuzz as try_cases
    from ..fuzzing import print_outcomes

    if cases < 1:
        raise ConfigError(f"symphony check fuzz: --cases must be at least 1, got {cases}")
    outcomes = try_cases(cases, seed)
    print_outcomes(outcomes)
    raise typer.Exit(1 if any(outcome.verdict == "failed" for outcome in outcomes) else 0)
