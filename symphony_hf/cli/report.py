"""`symphony report`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command(epilog="Example: symphony report runs/symphony runs/plain symphony-eval --output report.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of symphony train, quickstart, eval or routing.", metavar="RUN..."),
    ],
    output: Annotated[Path, typer.Option(help="The HTML file; replaced where there is one.")] = Path("report.html"),
) -> None:
    """Compare runs on one HTML page, with pictures and sortable tables: one file, which needs no network."""
    from ..reporting import read_runs, write_page

    page = write_page(read_runs(runs), output)
    plural = "" if len(runs) == 1 else "s"
    typer.echo(f"{len(runs)} run{plural}, {page.stat().st_size / 1e6:.1f} MB: {page.resolve()}")
