"""`symphony eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Dtype, Revision, Split, numbers


@app.command(
    "eval",
    epilog="Examples: symphony eval runs/symphony --against runs/plain --attack aaa,keyboard --- "
    "symphony eval allenai/OLMoE-1B-7B-0924 --data wiki.test.txt --attack all --severity 1,3,5 --seeds 0 --- "
    "symphony eval runs/phi3-qnli --task classification --name qnli --documents 1000 --- "
    "symphony eval runs/llava/final --task vqa --data digits --attack all-images --severity 1,3,5",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hub.")],
    against: Annotated[str | None, typer.Option(help="Another checkpoint, to compare it with.")] = None,
    task: Annotated[
        str,
        typer.Option(
            help="text: perplexity of any causal model; classification: accuracy at a GLUE task; vqa: accuracy at "
            "questions about images, of any vision-language model."
        ),
    ] = "text",
    data: Annotated[
        str | None,
        typer.Option(
            help="text: text file, table, folder, or Hub data set, instead of the Python library's own sources. "
            "classification: table or folder with the columns of --name, instead of GLUE on the Hub. vqa: LLaVA's "
            "JSON, or a folder of such, instead of digits."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="classification: qnli, sst2, ...; without it and --data, an offline stand-in.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="vqa: folder that the JSON's image names are in.")] = None,
    answers: Annotated[
        str | None, typer.Option(help="vqa: choose among all right answers (up to 100 of them), or free.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", help="vqa: of a free answer; 32 if not given.")
    ] = None,
    split: Split = None,
    text_column: Annotated[str | None, typer.Option("--text_column", help="text: of a table; text.")] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="all, or with commas. On text: aaa (if none is given), keyboard, char_delete, char_insert, char_swap, "
            "homoglyph, word_drop, word_shuffle. On images: all-images, or gaussian_noise (if none is given), "
            "shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, "
            "brightness, contrast, elastic_transform, pixelate, jpeg_compression."
        ),
    ] = None,
    severity: Annotated[str, typer.Option(help="From 1 to 5, with commas.")] = "1,2,3,4,5",
    seeds: Annotated[str, typer.Option(help="Of the attacks, with commas.")] = "0,1,2",
    documents: Annotated[int, typer.Option(help="Or questions, at most.")] = 100,
    block_size: Annotated[
        int | None,
        typer.Option("--block_size", help="text: tokens of a clean window; a quarter of what the models take."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Windows or questions a forward.")] = 8,
    dtype: Dtype = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Or processor, where a model has none of its own.")] = None,
    revision: Revision = None,
    against_revision: Annotated[str | None, typer.Option("--against_revision", help="Of the other one.")] = None,
    output: Annotated[
        str, typer.Option(help="Folder for result.json, robustness.png and finished cells.")
    ] = "symphony-eval",
) -> None:
    """Measure how a model holds up under attack on its input, alone or against another one. Stopped, it goes on."""
    from ..robustness import RobustnessSettings, evaluate_robustness, print_robustness

    settings = RobustnessSettings(
        model=model,
        against=against,
        task=task,
        data=data,
        name=name,
        images=images,
        answers=answers,
        max_new_tokens=max_new_tokens,
        split=split,
        text_column=text_column,
        attacks=None if attack is None else tuple(attack.split(",")),
        severities=numbers(severity, "eval", "severity"),
        seeds=numbers(seeds, "eval", "seeds"),
        documents=documents,
        block_size=block_size,
        batch_size=batch_size,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        against_revision=against_revision,
        output=output,
    )
    result = evaluate_robustness(settings)
    print_robustness(result)
    from ..diagnostics.plots import plot_robustness  # matplotlib is slow to import

    print(f"Curves: {plot_robustness(result, Path(output) / 'robustness.png').resolve()}")
