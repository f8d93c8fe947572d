"""`symphony routing`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import BatchSize, BlockSize, Dtype, Revision, Split, Text, TextColumn, Tokenizer, numbers


@app.command(
    epilog="Examples: symphony routing allenai/OLMoE-1B-7B-0924 --data wiki.test.txt --- "
    "symphony routing runs/mine/final --against runs/mine/checkpoint-100 --against runs/mine/checkpoint-500",
)
def routing(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hub; any MoE model.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Earlier checkpoints of it, the earliest first; once for each.")
    ] = None,
    data: Text = None,
    split: Split = None,
    text_column: TextColumn = "text",
    attack: Annotated[str, typer.Option(help="As of `symphony eval`, with commas; none for none.")] = "aaa",
    severity: Annotated[str, typer.Option(help="From 1 to 5, with commas.")] = "1,3,5",
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    documents: Annotated[int, typer.Option(help="At most.")] = 60,
    words: Annotated[int, typer.Option(help="Of a document, about: its first lines.")] = 400,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    similarity_tokens: Annotated[
        int, typer.Option("--similarity_tokens", help="On which experts are compared; 0: they are not.")
    ] = 256,
    drop_first: Annotated[
        bool, typer.Option("--drop_first/--no_drop_first", help="The loss without each token's first expert.")
    ] = True,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    output: Annotated[
        str, typer.Option(help="Folder for result.json, matrices.safetensors and pictures.")
    ] = "symphony-routing",
) -> None:
    """See how a model routes real text: loads, margins, experts, domains, attacks, and the way from its checkpoints."""
    from ..attacks import TEXT_ATTACKS
    from ..observation import RoutingSettings, draw_observation, observe_routing, print_observation

    attacks = {"all": tuple(TEXT_ATTACKS), "none": ()}
    settings = RoutingSettings(
        model=model,
        against=tuple(against or ()),
        data=data,
        split=split,
        text_column=text_column,
        attacks=attacks.get(attack, tuple(attack.split(","))),
        severities=numbers(severity, "routing", "severity"),
        seed=seed,
        documents=documents,
        words=words,
        block_size=block_size,
        batch_size=batch_size,
        drop_first=drop_first,
        similarity_tokens=similarity_tokens,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        output=output,
    )
    result = observe_routing(settings)
    print_observation(result)
    pictures = draw_observation(result, Path(output))
    print(f"{len(pictures)} pictures, result.json and matrices.safetensors: {Path(output).resolve()}")
