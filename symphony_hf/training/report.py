"""What a run leaves for people: `report.md`, from the same values as `results.json`."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from symphony_hf.compat import __version__
from symphony_hf.conversion.inspection.inspect import inspect_model, print_inspection
from symphony_hf.files import write_text
from symphony_hf.recipe import Recipe

from .launch import strategy_of, strategy_to_come
from .models import add_graph, empty_model
from .monitor import PICTURE
from .trainer import ResumableTrainer

if TYPE_CHECKING:
    from symphony_hf.data.prepared import PreparedData


REPORT = "report.md"
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "datasets", "bitsandbytes")


def describe_run(recipe: Recipe, trainer: ResumableTrainer, data: "PreparedData", command: str) -> dict[str, Any]:
    """What was run and how it went; what was measured at its end comes on top.

    Returns:
        Values for `results.json`.
    """
    state, parameters = trainer.state, list(trainer.model.parameters())
    train = dict(state.log_history[-1])
    mean_loss = trainer.mean_loss()
    if mean_loss is not None:
        train["train_loss"] = mean_loss
    return {
        "recipe": dataclasses.asdict(recipe),
        "command": command,
        "processes": trainer.accelerator.num_processes,
        "strategy": strategy_of(trainer.accelerator.state),
        "device": _device(trainer.args.device),
        "versions": {"symphony_hf": __version__, "python": platform.python_version(), **_versions()},
        "seeds": _seeds(recipe, trainer),
        "data": {"revision": data.revision, "notes": data.notes, "tokens": data.num_tokens},
        "parameters": {
            "total": sum(_size(parameter) for parameter in parameters),
            "trained": sum(_size(parameter) for parameter in parameters if parameter.requires_grad),
        },
        "train": train,
        "losses": [{"step": entry["step"], "loss": entry["loss"]} for entry in state.log_history if "loss" in entry],
        "validation": [entry for entry in state.log_history if "eval_loss" in entry],
        "best_checkpoint": state.best_model_checkpoint,
        "steps": state.global_step,
    }


def _seeds(recipe: Recipe, trainer: ResumableTrainer) -> dict[str, int]:
    """All of them, those that the recipe leaves to their defaults, too."""
    arguments = trainer.args
    data = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return {"training": arguments.seed, "data": data, "evaluation": recipe.eval.seed}


def _size(parameter: torch.Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # whole, where ZeRO-3 holds a part


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_run_report(results: Mapping[str, Any], output: Path) -> Path:
    """Write `report.md`.

    Args:
        results: As in `results.json`.
        output: The run's directory.

    Returns:
        The page.
    """
    page = output / REPORT
    write_text(page, "\n".join(_lines(results, output)) + "\n")
    return page


def _lines(results: Mapping[str, Any], output: Path) -> Iterator[str]:
    recipe, train = results["recipe"], results["train"]
    yield f"# {output.name}"
    yield ""
    if results["command"]:
        yield from ("```bash", results["command"], "```", "")
    yield from _table("Result", results["test"])
    if "train_loss" in train:
        loss, seconds = train["train_loss"], results["seconds"]
        yield f"Training: {results['steps']} steps, mean loss {loss:.4f}, {seconds:.0f} seconds in all."
        yield ""
    yield f"Model: `final/`, after the last step{_best(results)}. To share it: `symphony push {output} NAMESPACE/NAME`."
    parameters = results["parameters"]
    yield f"Parameters: {parameters['total']:,}, of which {parameters['trained']:,} were trained."
    yield f"Run by {results['processes']} processes, strategy {results['strategy']}, on {results['device']}."
    yield f"Data: {recipe['data']['path'] or 'embedded'}, revision {results['data']['revision']}."
    yield from (f"- {note}" for note in results["data"]["notes"])
    yield ""
    yield f"Seeds: {', '.join(f'{name} {seed}' for name, seed in results['seeds'].items())}."
    yield ""
    if (output / PICTURE).exists():
        yield from (f"![How often two experts are chosen together, by layer]({PICTURE})", "")
    yield from ("## Settings", "", "```yaml", yaml.safe_dump(_plain(recipe), sort_keys=False).strip(), "```", "")
    yield from ("## Versions", "", ", ".join(f"{name} {version}" for name, version in results["versions"].items()))


def _best(results: Mapping[str, Any]) -> str:
    best = results["best_checkpoint"]
    return f"; best by validation: `{Path(best).name}/`" if best else ""


def _table(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## {title}", "", "|  |  |", "|---|---|")
    for name, value in values.items():
        yield f"| {name.replace('_', ' ')} | {f'{value:.4f}' if isinstance(value, float) else value} |"
    yield ""


def _plain(value: Any) -> Any:
    """Without tuples and settings that are not there, which YAML would spell out."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def print_dry_run(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> None:
    """Print the plan of a run: the model, what is trained, on what, how, and where the results would go.

    Args:
        recipe: From `load_recipe`.
        arguments: From `prepare_run`, which refuses what cannot run.
        console: Where to.

    Raises:
        SymphonyError: If the model cannot be built, or not be symphonized.
    """
    console = console or Console()
    model = empty_model(recipe)
    add_graph(model, recipe)
    print_inspection(inspect_model(model), console)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_row("processes, strategy", f"{arguments.world_size}, {strategy_to_come(arguments)}")
    table.add_row("device", str(arguments.device))
    table.add_row("length", length)
    table.add_row("an optimizer step", f"{per_step} sequences of at most {recipe.data.block_size} tokens")
    table.add_row("data", _told(recipe.data))
    table.add_row("graph", "none: a plain model" if recipe.symphony is None else _told(recipe.symphony))
    table.add_row("adapters", "none: all parameters are trained" if recipe.peft is None else _told(recipe.peft))
    table.add_row("train", ", ".join(f"{name}: {value}" for name, value in recipe.train.items()))
    table.add_row("output", recipe.output.directory)
    console.print(table)
    console.print("This was a dry run: nothing was loaded, trained or written.", highlight=False)


def _told(section: Any) -> str:
    """The settings of a section that are not the defaults."""
    differing = [
        f"{field.name}: {getattr(section, field.name)}"
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    ]
    return ", ".join(differing) or "the defaults"
