"""`symphony attack`."""

from typing import Annotated

import typer

from .app import app


@app.command(epilog="Example: symphony attack wiki.test.txt --attack aaa --seed 0 --output wiki.test.attacked.txt")
def attack(
    file: Annotated[str, typer.Argument(help="A text file, UTF-8.")],
    output: Annotated[str, typer.Option(help="Where the attacked text goes.")],
    attack: Annotated[
        str,
        typer.Option(help="aaa, keyboard, char_delete, char_insert, char_swap, homoglyph, word_drop or word_shuffle."),
    ] = "aaa",
    severity: Annotated[int, typer.Option(help="From 1 to 5; 1 is the paper's, of aaa.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Share of words or letters, instead of a severity's.")] = None,
    minimum: Annotated[int | None, typer.Option(help="Of aaa: words replaced in a line at least; else 1.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of words and letters.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Write the attacked form of a text file: the same for the same file, seed and attack, on any machine."""
    from ..attacks import attack_file

    written = attack_file(
        file, output, attack, severity=severity, rate=rate, minimum=minimum, seed=seed, overwrite=overwrite
    )
    typer.echo(
        f"{attack} at rate {written.rate:g}, seed {seed}: {written.num_changed:,} of {written.num_lines:,} lines "
        f"changed. Written to {written.path.resolve()}"
    )
