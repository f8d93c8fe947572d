"""`symphony upcycle`, `merge`, `prune`, `topk`, `inspect`, `fold` and `push`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import CommitInfo

from symphony_hf.conversion.compression.settings import MergeSettings, PruneSettings, TopKSettings
from symphony_hf.conversion.push import fold_checkpoint
from symphony_hf.conversion.push import push as push_folder
from symphony_hf.conversion.upcycling.upcycle import UpcycleResult, print_result
from symphony_hf.conversion.upcycling.upcycle import upcycle as upcycle_checkpoint
from symphony_hf.errors import ConfigError

from .app import app, command_from


def _file_size(text: str) -> int:
    """Parse a size such as 5GB, or a number of bytes."""
    from symphony_hf.training.planning.tables import parse_bytes

    return parse_bytes(f"{text}B" if text.isdigit() else text)


@app.command(
    epilog="Example: symphony upcycle microsoft/Phi-3-mini-4k-instruct phi3-smoe-7.4b --to qwen2_moe --num_experts 4 "
    "--layers every-other"
)
@command_from(
    upcycle_checkpoint,
    arguments=("source", "target"),
    flags={"check": "--check/--no_check", "overwrite": "--overwrite/--no_overwrite"},
    parsers={"max_shard_size": _file_size},
)
def upcycle(result: UpcycleResult) -> None:
    """Turn a dense checkpoint into a MoE checkpoint on disk: each expert begins as a copy of the MLP."""
    print_result(result)


@app.command(epilog="Example: symphony merge symphony-quickstart/symphony merged --experts 8 --by graph")
@command_from(MergeSettings, arguments=("model", "output"), required=("output",))
def merge(settings: MergeSettings) -> None:
    """Merge similar experts into a smaller stock checkpoint, measured on held-out text before and after."""
    from symphony_hf.conversion.compression.merge import merge_experts
    from symphony_hf.conversion.compression.tables import print_compression

    print_compression(merge_experts(settings))


@app.command(epilog="Example: symphony prune symphony-quickstart/symphony pruned --experts 8 --by centrality")
@command_from(PruneSettings, arguments=("model", "output"), required=("output",))
def prune(settings: PruneSettings) -> None:
    """Remove the least important experts: a smaller stock checkpoint, measured on held-out text before and after."""
    from symphony_hf.conversion.compression.prune import prune_experts
    from symphony_hf.conversion.compression.tables import print_compression

    print_compression(prune_experts(settings))


@app.command(epilog="Example: symphony topk allenai/OLMoE-1B-7B-0924 olmoe-top4 --top_k 1,2,4,8 --keep 4")
@command_from(TopKSettings, arguments=("model", "output"))
def topk(settings: TopKSettings) -> None:
    """Measure a model with fewer experts per token, and optionally write one of these models as a stock checkpoint."""
    from symphony_hf.conversion.compression.tables import print_sweep
    from symphony_hf.conversion.compression.top_k import sweep_top_k

    print_sweep(sweep_top_k(settings))


@app.command(epilog="Example: symphony inspect allenai/OLMoE-1B-7B-0924")
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, a model on the Hub, or a recipe's YAML.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    four_bit: Annotated[bool, typer.Option("--four_bit", help="Estimate the memory with 4-bit experts.")] = False,
    output: Annotated[str | None, typer.Option(help="JSON file to write; with --four_bit.")] = None,
) -> None:
    """Show a model's parameters by part, active parameters, data types and routers, without loading weights."""
    from symphony_hf.checkpoints.model_class import empty_model
    from symphony_hf.conversion.inspection.inspect import inspect_model, print_inspection
    from symphony_hf.files import write_json
    from symphony_hf.results import check_file_place

    if output is not None and not four_bit:
        raise ConfigError("symphony inspect: --output is for --four_bit")
    if output is not None:
        check_file_place(output, "inspect")
    is_recipe = Path(model).suffix in (".yaml", ".yml")
    if is_recipe and revision is not None:
        raise ConfigError(
            f"symphony inspect: --revision is of a model, not of a recipe: set `model.revision` in `{model}`"
        )
    empty = _model_of_recipe(model) if is_recipe else None
    print_inspection(inspect_model(model if empty is None else empty, revision))
    if four_bit:
        from symphony_hf.conversion.quantization.estimate import plan_bytes, print_bytes_plan

        plan = plan_bytes(empty_model(model, revision) if empty is None else empty)
        print_bytes_plan(plan)
        if output is not None:
            write_json(Path(output), plan.to_dict())
            print(f"Written to {Path(output).resolve()}")


def _model_of_recipe(path: str) -> Any:
    """Build the model that a recipe trains, with its graphs, on the meta device."""
    from symphony_hf.recipe import load_recipe
    from symphony_hf.training.models import add_graph, empty_model

    recipe = load_recipe(path)
    model = empty_model(recipe)
    add_graph(model, recipe)
    return model


@app.command(epilog="Example: symphony fold runs/my-run/final my-model-plain")
@command_from(fold_checkpoint, arguments=("directory", "output"), parsers={"max_shard_size": _file_size})
def fold(written: Path) -> None:
    """Write a plain checkpoint with the graphs folded into the routers, for servers that do not know Symphony."""
    typer.echo(f"Written to {written}")


@app.command(epilog="Example: symphony push runs/my-run me/my-model --folded --private")
@command_from(
    push_folder,
    arguments=("directory", "repo_id"),
    names={"repo_id": "repository", "create_pr": "pull_request"},
    flags={"folded": "--folded", "private": "--private", "create_pr": "--pull_request"},
    left_out=("token",),
)
def push(commit: CommitInfo) -> None:
    """Push a model to the Hub with a card: safetensors only. The token is that of `hf auth login`, or HF_TOKEN."""
    typer.echo(commit.pr_url or commit.commit_url)
