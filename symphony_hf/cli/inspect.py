"""`symphony inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .app import app


@app.command(epilog="Example: symphony inspect allenai/OLMoE-1B-7B-0924")
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, a model on the Hub, or a recipe's YAML.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    four_bit: Annotated[bool, typer.Option("--four-bit", help="Measure what it takes with 4-bit experts.")] = False,
    output: Annotated[str | None, typer.Option(help="Where the JSON of --four-bit goes.")] = None,
) -> None:
    """Show what a model is made of: parameters by part, active ones, types, routers. No weights are loaded."""
    from ..anatomy import empty_model, inspect_model, print_inspection
    from ..unfinished import check_file_place, write_json

    if output is not None and not four_bit:
        raise ConfigError("symphony inspect: --output is for --four-bit")
    if output is not None:
        check_file_place(output, "inspect")
    empty = _model_of_recipe(model) if Path(model).suffix in (".yaml", ".yml") else None
    print_inspection(inspect_model(model if empty is None else empty, revision))
    if four_bit:
        from ..quantization import plan_bytes, print_bytes_plan

        plan = plan_bytes(empty_model(model, revision) if empty is None else empty)
        print_bytes_plan(plan)
        if output is not None:
            write_json(Path(output), plan.to_dict())
            print(f"Written to {Path(output).resolve()}")


def _model_of_recipe(path: str) -> Any:
    """What a recipe trains, with its graphs, and without weights."""
    from ..recipe import load_recipe
    from ..training.models import add_graph, empty_model

    recipe = load_recipe(path)
    model = empty_model(recipe)
    add_graph(model, recipe)
    return model
