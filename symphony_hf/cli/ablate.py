"""`symphony ablate`."""

from typing import Annotated, Any

import typer
import yaml

from .app import app


@app.command(
    epilog="Examples: symphony ablate recipes/wikitext103-216m/ablation/pairs.yaml --output runs/pairs --- "
    "symphony ablate STUDY.yaml --output DIR --set max_steps=100 --set data.path=my-text --dry_run",
)
def ablate(
    study: Annotated[str, typer.Argument(help="A study's YAML file: a recipe, axes, seeds.")],
    output: Annotated[str, typer.Option(help="Folder of the finished cells and of the report.")],
    workers: Annotated[int | None, typer.Option(help="Cells at a time, a thread each; else one a core.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the recipe, NAME=VALUE; several times for several.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; report what is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print the plan, with an estimate of its time.")] = False,
) -> None:
    """Run a grid of small training runs around a base point, and report it with intervals over seeds.

    Each cell is a process and a file of its own: stopped in any way, the same command goes on.
    """
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each cell; torch reads it when it is imported

    from ..ablation import load_study, print_ablation, run_ablation

    chosen = load_study(study, _changes(changes or []))
    values = run_ablation(chosen, output, workers=workers, dry_run=dry_run, report_only=report)
    print_ablation(values)
    if values.get("failed"):
        raise typer.Exit(1)


def _changes(texts: list[str]) -> dict[str, Any]:
    from ..errors import ConfigError

    for text in texts:
        if "=" not in text:
            raise ConfigError(f"symphony ablate: --set takes NAME=VALUE, got {text!r}")
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in texts)}
