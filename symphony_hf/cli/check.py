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
