"""`symphony prepare`."""

from typing import Annotated

import typer

from .app import app


@app.command(
    epilog="Examples: symphony prepare brown.zip --output text --split train --strip_tags / --- "
    "symphony prepare wiki.test.tokens --output text --split test",
)
def prepare(
    source: Annotated[str, typer.Argument(help="A text file, a folder of them, or a .zip of one; UTF-8.")],
    output: Annotated[str, typer.Option(help="Folder of the corpus, for a recipe's data.path.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    strip_tags: Annotated[
        str | None, typer.Option("--strip_tags", help="Cut each word at the last of this sign: / for word/tag.")
    ] = None,
) -> None:
    """Write text as one file a document into a split of a corpus, with words that are tagged made plain."""
    from ..data import prepare_split

    written = prepare_split(source, output, split=split, strip_tags=strip_tags)
    typer.echo(
        f"{written.num_documents:,} documents of {written.num_words:,} words. Written to {written.folder.resolve()}"
    )
