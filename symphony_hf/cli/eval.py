"""`symphony eval`."""

from typing import Annotated

import typer

from .app import app


@app.command(
    "eval",
    epilog="Examples: symphony eval runs/symphony --against runs/plain --attack aaa,keyboard --- "
    "symphony eval allenai/OLMoE-1B-7B-0924 --data wiki.test.txt --attack all --severity 1,3,5 --seeds 0",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hub; any causal model.")],
    against: Annotated[str | None, typer.Option(help="Another checkpoint, to compare it with.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text file, table, folder, or Hub data set, instead of the Python library's own sources."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, validation, test or all; of one file: all.")] = None,
    text_column: Annotated[str, typer.Option("--text_column", help="Of a table.")] = "text",
    attack: Annotated[
        str,
        typer.Option(
            help="all, or with commas: aaa, keyboard, char_delete, char_insert, char_swap, homoglyph, word_drop, "
            "word_shuffle."
        ),
    ] = "aaa",
    severity: Annotated[str, typer.Option(help="From 1 to 5, with commas.")] = "1,2,3,4,5",
    seeds: Annotated[str, typer.Option(help="Of the attacks, with commas.")] = "0,1,2",
    documents: Annotated[int, typer.Option(help="At most.")] = 100,
    block_size: Annotated[
        int | None, typer.Option("--block_size", help="Tokens of a clean window; a quarter of what the models take.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Windows a forward.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Where a model has none of its own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of MODEL on the Hub.")] = None,
    against_revision: Annotated[str | None, typer.Option("--against_revision", help="Of the other one.")] = None,
    output: Annotated[str, typer.Option(help="Folder for result.json and finished cells.")] = "symphony-eval",
) -> None:
    """Measure how a model holds up under attack on its input, alone or against another one. Stopped, it goes on."""
    from ..attacks import TEXT_ATTACKS
    from ..robustness import RobustnessSettings, evaluate_robustness, print_robustness

    settings = RobustnessSettings(
        model=model,
        against=against,
        data=data,
        split=split,
        text_column=text_column,
        attacks=tuple(TEXT_ATTACKS) if attack == "all" else tuple(attack.split(",")),
        severities=_numbers(severity, "severity"),
        seeds=_numbers(seeds, "seeds"),
        documents=documents,
        block_size=block_size,
        batch_size=batch_size,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        against_revision=against_revision,
        output=output,
    )
    print_robustness(evaluate_robustness(settings))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    from ..errors import ConfigError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"symphony eval: --{option} takes numbers with commas between them, got {text!r}") from error
