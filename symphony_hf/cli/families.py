"""`symphony families`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import app


@app.command(epilog="Example: symphony families mixtral olmoe --check")
def families(
    names: Annotated[list[str] | None, typer.Argument(help="Model types; all by default.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run every check on each: about a second a family.")] = False,
    readme: Annotated[
        str | None,
        typer.Option(help="A page to write the table into, between its marks; with --check and no names."),
    ] = None,
) -> None:
    """What symphonize can do for the MoE families of the installed transformers; exits with 1 if a check fails."""
    from ..conformance.matrix import known_families, run_matrix
    from ..conformance.table import print_rows, write_readme

    if readme is not None and (names or not check):
        raise ConfigError("symphony families: --readme needs --check, and all families")
    rows = run_matrix(known_families(names), check)
    print_rows(rows)
    if readme is not None:
        write_readme(Path(readme), rows)
    raise typer.Exit(1 if any(row.failures for row in rows) else 0)
