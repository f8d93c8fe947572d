"""`symphony train`."""

from typing import Annotated

import typer

from .app import app


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: symphony train recipes/quickstart/config.yaml --dry_run; "
    "symphony train recipes/quickstart/config.yaml --max_steps 2 --symphony.strength 0",
)
def train(context: typer.Context, recipe: Annotated[str, typer.Argument(help="A recipe's YAML file.")]) -> None:
    """Train what a recipe says. For several processes: accelerate launch -m symphony_hf.train.

    Any setting can be overridden: --NAME VALUE for one of the train section (TrainingArguments' own name, such as
    --max_steps 100 or --resume_from_checkpoint true), --SECTION.NAME VALUE for others. With --dry_run, print what would
    be done, and touch nothing.
    """
    from ..train import main as train_main

    raise typer.Exit(train_main([recipe, *context.args]))
