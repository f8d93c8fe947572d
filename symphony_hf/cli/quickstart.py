"""`symphony quickstart`."""

from typing import Annotated

import typer

from .app import app


@app.command(epilog="Example: symphony quickstart --output my-first-run --seed 1")
def quickstart(
    output: Annotated[str, typer.Option(help="Folder for checkpoints, report and pictures.")] = "symphony-quickstart",
    data: Annotated[
        str | None,
        typer.Option(help="Text file, folder, or Hub data set, instead of the Python library's own sources."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches, attack and bootstrap.")] = 0,
    pretrain_steps: Annotated[int, typer.Option("--pretrain_steps", help="Optimizer steps of the base model.")] = 600,
    finetune_steps: Annotated[int, typer.Option("--finetune_steps", help="Optimizer steps of each copy.")] = 300,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sequences a step.")] = 16,
    block_size: Annotated[int, typer.Option("--block_size", help="Tokens a sequence.")] = 128,
    vocab_size: Annotated[int, typer.Option("--vocab_size", help="Of the tokenizer.")] = 2048,
    documents: Annotated[int, typer.Option(help="Held-out documents to evaluate on.")] = 60,
    attack_rate: Annotated[float, typer.Option("--attack_rate", help="Share of a line's words replaced.")] = 0.015,
) -> None:
    """Train a small MoE with and without its expert graph on real text, and compare: minutes, on a CPU."""
    from ..quickstart import QuickstartSettings, run_quickstart
    from ..report import print_report

    settings = QuickstartSettings(
        output=output,
        data=data,
        seed=seed,
        pretrain_steps=pretrain_steps,
        finetune_steps=finetune_steps,
        batch_size=batch_size,
        block_size=block_size,
        vocab_size=vocab_size,
        documents=documents,
        attack_rate=attack_rate,
    )
    print_report(run_quickstart(settings))
