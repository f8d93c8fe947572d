"""The typer app that every command registers with, and the options that several commands have."""

from typing import Annotated

import typer

from symphony_hf.errors import ConfigError

app = typer.Typer(
    help="Symphony routing for Hugging Face MoE models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Text = Annotated[
    str | None,
    typer.Option(help="Text file, table, folder, or Hub data set, instead of the Python library's own sources."),
]
TextColumn = Annotated[str, typer.Option("--text_column", help="Of a table.")]
Split = Annotated[str | None, typer.Option(help="train, validation, test or all; of one file: all.")]
BlockSize = Annotated[
    int | None, typer.Option("--block_size", help="Tokens of a clean window; a quarter of what the model takes.")
]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Windows a forward.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Tokenizer = Annotated[str | None, typer.Option(help="Where the model has none of its own.")]
Revision = Annotated[str | None, typer.Option(help="Of MODEL on the Hub.")]


def numbers(text: str, command: str, option: str) -> tuple[int, ...]:
    """The numbers of an option that takes them with commas between.

    Raises:
        ConfigError: If it has something else.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"symphony {command}: --{option} takes numbers with commas between them, got {text!r}"
        ) from error
