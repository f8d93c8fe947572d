"""`symphony eval`, `attack`, `report` and `routing`."""

from pathlib import Path
from typing import Annotated

import typer

from symphony_hf.evaluation.attacks.files import AttackedFile, attack_file
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS
from symphony_hf.evaluation.robustness.settings import RobustnessSettings
from symphony_hf.evaluation.routing.settings import RoutingSettings

from .app import app, command_from


@app.command(
    "eval",
    epilog="Examples: symphony eval runs/symphony/final --against runs/plain/final --attack aaa,keyboard\n\n"
    "symphony eval allenai/OLMoE-1B-7B-0924 --data wiki.test.txt --attack all --severity 1,3,5 --seeds 0\n\n"
    "symphony eval runs/phi3-smoe-7.4b-qnli/final --task classification --name qnli --documents 1000\n\n"
    "symphony eval runs/llava/final --task vqa --data digits --attack all-images --severity 1,3,5",
)
@command_from(RobustnessSettings, names={"attacks": "attack", "severities": "severity"})
def eval_(settings: RobustnessSettings) -> None:
    """Measure how a model holds up under attacks on its input, alone or against another model.

    An interrupted run continues where it stopped.
    """
    from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness
    from symphony_hf.evaluation.robustness.tables import print_robustness

    result = evaluate_robustness(settings)
    print_robustness(result)
    from symphony_hf.diagnostics.plots.attacks import plot_robustness  # matplotlib is slow to import

    print(f"Curves: {plot_robustness(result, Path(settings.output) / 'robustness.png').resolve()}")


@app.command(epilog="Example: symphony attack wiki.test.txt --attack aaa --seed 0 --output wiki.test.attacked.txt")
@command_from(
    attack_file, arguments=("source",), names={"source": "file"}, flags={"overwrite": "--overwrite/--no_overwrite"}
)
def attack(written: AttackedFile) -> None:
    """Write the attacked form of a text file: the same for the same file, seed and attack, on any machine."""
    typer.echo(
        f"{written.attack} at rate {written.rate:g}, seed {written.seed}: {written.num_changed:,} of "
        f"{written.num_lines:,} lines changed. Written to {written.path.resolve()}"
    )


@app.command(epilog="Example: symphony report runs/symphony runs/plain symphony-eval --output report.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of symphony train, quickstart, eval or routing.", metavar="RUN..."),
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write; an existing file is replaced.")] = Path(
        "report.html"
    ),
) -> None:
    """Compare runs on one HTML page, with pictures and sortable tables: a single file that works offline."""
    from symphony_hf.evaluation.report.find_runs import read_runs
    from symphony_hf.evaluation.report.page import write_page

    page = write_page(read_runs(runs), output)
    plural = "" if len(runs) == 1 else "s"
    typer.echo(f"{len(runs)} run{plural}, {page.stat().st_size / 1e6:.1f} MB: {page.resolve()}")


@app.command(
    epilog="Examples: symphony routing allenai/OLMoE-1B-7B-0924 --data wiki.test.txt\n\n"
    "symphony routing runs/mine/final --against runs/mine/checkpoint-100 --against runs/mine/checkpoint-500",
)
@command_from(
    RoutingSettings,
    names={"attacks": "attack", "severities": "severity"},
    flags={"drop_first": "--drop_first/--no_drop_first"},
    repeated=("against",),
    parsers={"attacks": lambda text: {"all": tuple(TEXT_ATTACKS), "none": ()}.get(text, tuple(text.split(",")))},
)
def routing(settings: RoutingSettings) -> None:
    """Show how a model routes real text: loads, margins, domains, attacks, and how its checkpoints came to it."""
    from symphony_hf.evaluation.routing.observe import observe_routing
    from symphony_hf.evaluation.routing.pictures import draw_observation
    from symphony_hf.evaluation.routing.tables import print_observation

    result = observe_routing(settings)
    print_observation(result)
    pictures = draw_observation(result, Path(settings.output))
    print(f"{len(pictures)} pictures, result.json and matrices.safetensors: {Path(settings.output).resolve()}")
