"""`symphony push`."""

from typing import Annotated

import typer

from .app import app


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
    from ..sharing import push as push_folder

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
