"""`symphony evidence`."""

from typing import Annotated

import typer

from .app import app


@app.command(
    epilog="Example: symphony evidence --ablation runs/ablation --theory symphony-theory, in the project's folder",
)
def evidence(
    folder: Annotated[str, typer.Option(help="Of the result files.")] = "recipes/evidence",
    page: Annotated[str, typer.Option(help="The page that is written of them.")] = "recipes/EVIDENCE.md",
    ablation: Annotated[str | None, typer.Option(help="Output folder of `symphony ablate`, to take in.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Likewise, of the three pairs, where they were run at another size.")
    ] = None,
    about: Annotated[str | None, typer.Option(help="What the studies' text is, in a sentence.")] = None,
    theory: Annotated[str | None, typer.Option(help="Output folder of `symphony theory`, to take in.")] = None,
) -> None:
    """Write the page of evidence from result files, next to the paper's numbers; take new results in first."""
    from ..evidence import add_results, write_evidence

    add_results(folder, about, pairs=pairs, ablation=ablation, theory=theory)
    typer.echo(f"Written to {write_evidence(folder, page).resolve()}")
