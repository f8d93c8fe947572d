"""`symphony merge`, `symphony prune` and `symphony topk`: each parameter is the setting of its name."""

from typing import Annotated

import typer

from .app import app
from .options import BatchSize, BlockSize, Dtype, Revision, Text, TextColumn, Tokenizer, numbers

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
    from ..compression import MergeSettings, merge_experts, print_compression

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
    from ..compression import PruneSettings, print_compression, prune_experts

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
    from ..compression import TopKSettings, print_sweep, sweep_top_k

    tried = None if top_k is None else numbers(top_k, "topk", "top_k")
    print_sweep(sweep_top_k(TopKSettings(**context.params | {"top_k": tried})))
