"""`symphony plan`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import app


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: symphony plan recipes/phi3-smoe-7.4b-glue/config.yaml --gpus 1,4,8 --gpu_memory 80GB; "
    "symphony plan recipes/olmoe-7b-sft/full.yaml --sequences 200000 --per_device_train_batch_size 4 --json plan.json; "
    "symphony plan recipes/quickstart/config.yaml --gpus 1 --gpu_memory 24GB --gpu_flops 165e12 --utilization 0.3",
)
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file.")],
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs of one machine, with commas.")] = "1,4,8",
    gpu_memory: Annotated[str, typer.Option("--gpu_memory", help="Of one GPU, such as 80GB or 79.6GiB.")] = "80GB",
    gpu_flops: Annotated[
        float, typer.Option("--gpu_flops", help="Peak of one GPU, FLOPs a second; an H100's in bfloat16 by default.")
    ] = 989.5e12,
    utilization: Annotated[float, typer.Option(help="The share of the peak that training reaches.")] = 0.35,
    sequences: Annotated[
        int | None, typer.Option(help="Training sequences of one epoch, where the data is not here to be counted.")
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            help="A configuration of accelerate, or a folder of them; `accelerate/` beside the recipe's folder."
        ),
    ] = None,
    json: Annotated[str | None, typer.Option(help="Where a JSON of everything goes.")] = None,
) -> None:
    """Plan a recipe: memory by part under each launch, the largest micro-batch, tokens, hours. No weights are loaded.

    Any setting of the recipe can be overridden by name, as for `symphony train`.
    """
    from ..planning import Machine, accelerate_folder, parse_bytes, plan_recipe, print_plan, read_launches
    from ..recipe import load_recipe
    from ..train import parse_overrides
    from ..unfinished import check_file_place, write_json

    if json is not None:
        check_file_place(json, "plan")
    machine = Machine(parse_bytes(gpu_memory), gpu_flops, utilization)
    counts = [_count(text) for text in gpus.split(",")]
    loaded = load_recipe(recipe, parse_overrides(context.args))
    launches = read_launches(accelerate or accelerate_folder(recipe))
    made = plan_recipe(loaded, launches, counts, machine, sequences)
    print_plan(made)
    if json is not None:
        write_json(Path(json), made.to_dict())
        print(f"Written to {Path(json).resolve()}")


def _count(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(
            f"plan: --gpus: `{text.strip()}` is no number of GPUs: expected numbers from 1, such as 1,4,8"
        )
    return int(text)
