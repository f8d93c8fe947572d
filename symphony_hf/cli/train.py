"""`symphony train`."""

from typing import Annotated

import typer

from .app import app


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: symphony train recipes/quickstart/config.yaml --max_steps 2 --symphony.strength 0",
)
def train(context: typer.Context, recipe: Annotated[str, typer.Argument(help="A recipe's YAML file.")]) -> None:
    """Train what a recipe says; any setting can be overridden by name. For several processes use accelerate launch."""
    from ..train import main as train_main

    raise typer.Exit(train_main([recipe, *context.args]))
