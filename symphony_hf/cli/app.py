"""The typer app that every command registers with."""

import typer

app = typer.Typer(
    help="Symphony routing for Hugging Face MoE models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
