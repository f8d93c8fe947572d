"""`symphony upcycle`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from symphony_hf.errors import ConfigError

from .app import BatchSize, BlockSize, Dtype, Revision, Text, TextColumn, Tokenizer, app, numbers

_NUMBERS = re.compile(r"\d+(\s*,\s*\d+)*")


@app.command(
    epilog="Example: symphony upcycle microsoft/Phi-3-mini-4k-instruct phi3-smoe-7.4b --to qwen2_moe --num_experts 4 "
    "--layers every-other"
)
def upcycle(
    source: Annotated[str, typer.Argument(help="The dense checkpoint: a folder, or its name on the Hub.")],
    target: Annotated[str, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str | None, typer.Option(help="mixtral, qwen2_moe, qwen3_moe or granitemoe; what fits the source by default.")
    ] = None,
    num_experts: Annotated[int, typer.Option("--num_experts", help="Copies of each MLP.")] = 8,
    top_k: Annotated[int, typer.Option("--top_k", help="Experts that compute a token.")] = 2,
    layers: Annotated[
        str, typer.Option(help="all, every-other, or numbers from 0 with commas: whose MLPs become experts.")
    ] = "all",
    router_std: Annotated[float, typer.Option("--router_std", help="Deviation of the routers' weights.")] = 0.02,
    router_init: Annotated[str, typer.Option("--router_init", help="normal or uniform.")] = "normal",
    seed: Annotated[int, typer.Option(help="Of routers and noise.")] = 0,
    noise: Annotated[float, typer.Option(help="On the copies, relative; above 0 nothing can be checked.")] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="Cast to float32, bfloat16 or float16.")] = None,
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="Of a file.")] = "5GB",
    check: Annotated[bool, typer.Option(help="Compare both models' logits, a layer in memory at a time.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the target, once the new is whole.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Make a MoE of a dense checkpoint, from file to file: each expert begins as a copy of the MLP."""
    from symphony_hf.conversion.upcycling.upcycle import print_result
    from symphony_hf.conversion.upcycling.upcycle import upcycle as run

    result = run(
        source,
        target,
        to=to,
        num_experts=num_experts,
        top_k=top_k,
        layers=[int(n) for n in layers.split(",")] if _NUMBERS.fullmatch(layers) else layers,
        router_std=router_std,
        router_init=router_init,
        seed=seed,
        noise=noise,
        dtype=dtype,
        max_shard_size=max_shard_size,
        check=check,
        overwrite=overwrite,
        revision=revision,
    )
    print_result(result)


@app.command("bench-upcycle", epilog="Example: symphony bench-upcycle --output upcycle.json")
def bench_upcycle(
    folder: Annotated[str, typer.Option(help="Where the checkpoints are written, and deleted again: 40 GB.")] = ".",
    shrink: Annotated[int, typer.Option(help="Divide Phi-3-mini's widths by this, to try it out.")] = 1,
    rounds: Annotated[int, typer.Option(help="Upcyclings and plain copies, in alternation.")] = 2,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench-upcycle.json",
) -> None:
    """Measure upcycling at Phi-3-mini's shapes: memory, and seconds beside a plain copy of as many bytes."""
    from symphony_hf.experiments.bench.upcycle import print_bench_upcycle, run_bench_upcycle

    print_bench_upcycle(run_bench_upcycle(folder, shrink=shrink, rounds=rounds, output=output))


_Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hub; any MoE language model.")]
_Output = Annotated[str, typer.Argument(help="The folder to write.")]
_Experts = Annotated[int, typer.Option(help="To leave in each layer.")]
_Graph = Annotated[
    str, typer.Option(help="learned: the model's own; counted: of the calibration text, for models without one.")
]
_CalibrationTokens = Annotated[int, typer.Option("--calibration_tokens", help="Of the train split.")]
_Documents = Annotated[int, typer.Option(help="Of the test split, to evaluate on, at most.")]
_Seed = Annotated[int, typer.Option(help="Of the calibration's blocks and the bootstrap.")]
_Result = Annotated[str | None, typer.Option(help="File for the result; result.json in the output.")]


@app.command(epilog="Example: symphony merge symphony-quickstart/symphony merged --experts 8 --by graph")
def merge(
    context: typer.Context,
    model: _Model,
    output: _Output,
    experts: _Experts,
    by: Annotated[str, typer.Option(help="graph, or outputs (HC-SMoE).")],
    graph: _Graph = "learned",
    calibration_tokens: _CalibrationTokens = 65_536,
    data: Text = None,
    text_column: TextColumn = "text",
    documents: _Documents = 100,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    seed: _Seed = 0,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    result: _Result = None,
) -> None:
    """Merge experts that are alike: a smaller stock checkpoint, measured on held-out text before and after."""
    from symphony_hf.conversion.compression.merge import merge_experts
    from symphony_hf.conversion.compression.settings import MergeSettings
    from symphony_hf.conversion.compression.tables import print_compression

    print_compression(merge_experts(MergeSettings(**context.params)))


@app.command(epilog="Example: symphony prune symphony-quickstart/symphony pruned --experts 8 --by centrality")
def prune(
    context: typer.Context,
    model: _Model,
    output: _Output,
    experts: _Experts,
    by: Annotated[str, typer.Option(help="load, centrality (of the graph), or reap (gate-weighted output norm).")],
    graph: _Graph = "learned",
    calibration_tokens: _CalibrationTokens = 65_536,
    data: Text = None,
    text_column: TextColumn = "text",
    documents: _Documents = 100,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    seed: _Seed = 0,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    result: _Result = None,
) -> None:
    """Drop the experts that matter least: a smaller stock checkpoint, measured on held-out text before and after."""
    from symphony_hf.conversion.compression.prune import prune_experts
    from symphony_hf.conversion.compression.settings import PruneSettings
    from symphony_hf.conversion.compression.tables import print_compression

    print_compression(prune_experts(PruneSettings(**context.params)))


@app.command(epilog="Example: symphony topk allenai/OLMoE-1B-7B-0924 olmoe-top4 --top_k 1,2,4,8 --keep 4")
def topk(
    context: typer.Context,
    model: _Model,
    output: Annotated[str | None, typer.Argument(help="The folder to write, if a checkpoint is wanted.")] = None,
    top_k: Annotated[
        str | None, typer.Option("--top_k", help="Numbers with commas; all up to the model's own.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="The one that the checkpoint in OUTPUT chooses.")] = None,
    data: Text = None,
    text_column: TextColumn = "text",
    documents: _Documents = 100,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    seed: _Seed = 0,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    result: Annotated[
        str | None, typer.Option(help="File for the result; result.json in the output, or symphony-topk.json.")
    ] = None,
) -> None:
    """Measure a model with fewer experts a token, and write one of them as a stock checkpoint if asked to."""
    from symphony_hf.conversion.compression.settings import TopKSettings
    from symphony_hf.conversion.compression.tables import print_sweep
    from symphony_hf.conversion.compression.top_k import sweep_top_k

    tried = None if top_k is None else numbers(top_k, "topk", "top_k")
    print_sweep(sweep_top_k(TopKSettings(**context.params | {"top_k": tried})))


@app.command(epilog="Example: symphony inspect allenai/OLMoE-1B-7B-0924")
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, a model on the Hub, or a recipe's YAML.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    four_bit: Annotated[bool, typer.Option("--four-bit", help="Measure what it takes with 4-bit experts.")] = False,
    output: Annotated[str | None, typer.Option(help="Where the JSON of --four-bit goes.")] = None,
) -> None:
    """Show what a model is made of: parameters by part, active ones, types, routers. No weights are loaded."""
    from symphony_hf.checkpoints.model_class import empty_model
    from symphony_hf.conversion.inspection.inspect import inspect_model, print_inspection
    from symphony_hf.files import check_file_place, write_json

    if output is not None and not four_bit:
        raise ConfigError("symphony inspect: --output is for --four-bit")
    if output is not None:
        check_file_place(output, "inspect")
    empty = _model_of_recipe(model) if Path(model).suffix in (".yaml", ".yml") else None
    print_inspection(inspect_model(model if empty is None else empty, revision))
    if four_bit:
        from symphony_hf.conversion.quantization.estimate import plan_bytes, print_bytes_plan

        plan = plan_bytes(empty_model(model, revision) if empty is None else empty)
        print_bytes_plan(plan)
        if output is not None:
            write_json(Path(output), plan.to_dict())
            print(f"Written to {Path(output).resolve()}")


def _model_of_recipe(path: str) -> Any:
    """What a recipe trains, with its graphs, and without weights."""
    from symphony_hf.recipe import load_recipe
    from symphony_hf.training.models import add_graph, empty_model

    recipe = load_recipe(path)
    model = empty_model(recipe)
    add_graph(model, recipe)
    return model


@app.command(epilog="Example: symphony push runs/my-run me/my-model --folded --private")
def push(
    directory: Annotated[str, typer.Argument(help="Of a checkpoint, a folded one, an adapter, or a run.")],
    repository: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub; made if it is not there.")],
    folded: Annotated[bool, typer.Option("--folded", help="The plain form, for software without graphs.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository for its owner alone.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull_request", help="Open a pull request instead.")] = False,
    base_model: Annotated[str | None, typer.Option("--base_model", help="Its name on the Hub, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the base model; else as the Hub has it.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set on the Hub, or a description, for the card.")] = None,
) -> None:
    """Push a model to the Hub with a card: safetensors only. The token is that of `hf auth login`, or HF_TOKEN."""
    from symphony_hf.conversion.push import push as push_folder

    commit = push_folder(
        directory,
        repository,
        folded=folded,
        private=private or None,
        revision=revision,
        create_pr=pull_request,
        base_model=base_model,
        license=license,
        data=data,
    )
    typer.echo(commit.pr_url or commit.commit_url)
