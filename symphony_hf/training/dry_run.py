"""What a recipe would do, resolved as far as is possible without touching data, weights or the disk."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from ..anatomy import inspect_model, print_inspection
from ..recipe import Recipe
from .launch import strategy_to_come
from .models import add_graph, empty_model


def print_dry_run(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> None:
    """Print the plan of a run: the model, what is trained, on what, how, and where the results would go.

    Args:
        recipe: From `load_recipe`.
        arguments: From `prepare_run`, which refuses what cannot run.
        console: Where to.

    Raises:
        SymphonyError: If the model cannot be built, or not be symphonized.
    """
    console = console or Console()
    model = empty_model(recipe)
    add_graph(model, recipe)
    print_inspection(inspect_model(model), console)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_row("processes, strategy", f"{arguments.world_size}, {strategy_to_come(arguments)}")
    table.add_row("device", str(arguments.device))
    table.add_row("length", length)
    table.add_row("an optimizer step", f"{per_step} sequences of at most {recipe.data.block_size} tokens")
    table.add_row("data", _told(recipe.data))
    table.add_row("graph", "none: a plain model" if recipe.symphony is None else _told(recipe.symphony))
    table.add_row("adapters", "none: all parameters are trained" if recipe.peft is None else _told(recipe.peft))
    table.add_row("train", ", ".join(f"{name}: {value}" for name, value in recipe.train.items()))
    table.add_row("output", recipe.output.directory)
    console.print(table)
    console.print("This was a dry run: nothing was loaded, trained or written.", highlight=False)


def _told(section: Any) -> str:
    """The settings of a section that are not the defaults."""
    differing = [
        f"{field.name}: {getattr(section, field.name)}"
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    ]
    return ", ".join(differing) or "the defaults"
