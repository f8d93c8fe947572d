"""`symphony train`, `plan`, `prepare` and `quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from symphony_hf.data.splits import PreparedSplit, prepare_split
from symphony_hf.errors import ConfigError
from symphony_hf.training.quickstart_settings import QuickstartSettings

from .app import app, command_from


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: symphony train recipes/quickstart/config.yaml --dry_run\n\n"
    "symphony train recipes/quickstart/config.yaml --max_steps 2 --symphony.strength 0",
)
def train(context: typer.Context, recipe: Annotated[str, typer.Argument(help="A recipe's YAML file.")]) -> None:
    """Train a recipe. For several processes: accelerate launch -m symphony_hf.train.

    Any setting can be overridden: --NAME VALUE for one of the train section (TrainingArguments' own name, such as
    --max_steps 100 or --resume_from_checkpoint true), --SECTION.NAME VALUE for others. With --dry_run, print the
    plan without loading or writing anything.
    """
    from symphony_hf.train import main as train_main

    raise typer.Exit(train_main([recipe, *context.args]))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: symphony plan recipes/phi3-smoe-7.4b-glue/config.yaml --gpus 1,4,8 --gpu_memory 80GB\n\n"
    "symphony plan recipes/olmoe-7b-sft/full.yaml --sequences 200000 --per_device_train_batch_size 4 --json p.json\n\n"
    "symphony plan recipes/quickstart/config.yaml --gpus 1 --gpu_memory 24GB --gpu_flops 165e12 --utilization 0.3",
)
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file.")],
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs in one machine, separated by commas.")] = "1,4,8",
    gpu_memory: Annotated[
        str, typer.Option("--gpu_memory", help="Memory of one GPU, such as 80GB or 79.6GiB.")
    ] = "80GB",
    gpu_flops: Annotated[
        float, typer.Option("--gpu_flops", help="Peak FLOP/s of one GPU; by default an H100's in bfloat16.")
    ] = 989.5e12,
    utilization: Annotated[float, typer.Option(help="Fraction of the peak that training reaches.")] = 0.35,
    sequences: Annotated[
        int | None, typer.Option(help="Number of training sequences per epoch, if the data is not available locally.")
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            help="Accelerate config, or a folder of them; by default `accelerate/` next to the recipe's folder."
        ),
    ] = None,
    json: Annotated[str | None, typer.Option(help="JSON file to write the plan to.")] = None,
) -> None:
    """Plan a recipe: memory by part under each launch, the largest micro-batch, tokens, hours. No weights are loaded.

    Any setting of the recipe can be overridden by name, as for `symphony train`.
    """
    from symphony_hf.files import write_json
    from symphony_hf.recipe import load_recipe
    from symphony_hf.results import check_file_place
    from symphony_hf.train import parse_overrides
    from symphony_hf.training.planning.launches import read_launches
    from symphony_hf.training.planning.plan import Machine, accelerate_folder, plan_recipe
    from symphony_hf.training.planning.tables import parse_bytes, print_plan

    if json is not None:
        check_file_place(json, "plan")
    machine = Machine(parse_bytes(gpu_memory), gpu_flops, utilization)
    counts = [_count(text) for text in gpus.split(",")]
    loaded = load_recipe(recipe, parse_overrides(context.args))
    folder = accelerate_folder(recipe)
    if accelerate is None and not folder.is_dir():
        raise ConfigError(
            f"plan: no accelerate configurations in `{folder}`: give one, or a folder of them, by --accelerate"
        )
    launches = read_launches(accelerate or folder)
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


@app.command(
    epilog="Examples: symphony prepare brown.zip --output text --split train --strip_tags /\n\n"
    "symphony prepare wiki.test.tokens --output text --split test",
)
@command_from(prepare_split, arguments=("source",))
def prepare(written: PreparedSplit) -> None:
    """Write text into a split of a corpus, one file per document, optionally without part-of-speech tags."""
    typer.echo(
        f"{written.num_documents:,} documents of {written.num_words:,} words. Written to {written.folder.resolve()}"
    )


@app.command(epilog="Example: symphony quickstart --output my-first-run --seed 1")
@command_from(QuickstartSettings)
def quickstart(settings: QuickstartSettings) -> None:
    """Train a small MoE with and without its expert graph on real text, and compare: minutes, on a CPU."""
    from symphony_hf.evaluation.report.quickstart import print_report
    from symphony_hf.training.quickstart import run_quickstart

    print_report(run_quickstart(settings))
