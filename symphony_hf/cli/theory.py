"""`symphony theory`."""

from typing import Annotated

import typer

from .app import app


@app.command(epilog="Example: symphony theory --output theory --seeds 10")
def theory(
    output: Annotated[str, typer.Option(help="Folder of theory.json and the pictures.")] = "symphony-theory",
    seeds: Annotated[int, typer.Option(help="How many, from 0 on.")] = 5,
    experts: Annotated[int, typer.Option(help="Of the router.")] = 16,
    communities: Annotated[int, typer.Option(help="Of experts that belong together.")] = 4,
    within: Annotated[float, typer.Option(help="Chance that a token's two experts are of one community.")] = 0.9,
) -> None:
    """Check the graph where the truth is planted: how fast it is found, and what routing by it gains under noise."""
    from ..theory import TheorySettings, print_theory, run_theory

    settings = TheorySettings(
        output=output, seeds=range(seeds), num_experts=experts, num_communities=communities, within=within
    )
    print_theory(run_theory(settings))
