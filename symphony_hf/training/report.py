"""The report of a run: `report.md`, from the same values as `results.json`, and the printed plan of a dry run."""

import dataclasses
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import TrainingArguments

from symphony_hf.checkpoints.hub_names import origin_record
from symphony_hf.compat import versions
from symphony_hf.conversion.inspection.inspect import inspect_model, print_inspection
from symphony_hf.data.glue import describe_data
from symphony_hf.errors import ConfigError
from symphony_hf.files import write_text
from symphony_hf.recipe import Recipe
from symphony_hf.settings import changed_settings
from symphony_hf.tables import Table

from .damage import damage_of
from .launch import expected_strategy, strategy_of
from .models import add_adapters, add_graph, choose_trained, empty_model
from .monitor import PICTURE, GraphMonitor
from .processors import tokenizer_source
from .routing_monitor import RoutingMonitor
from .trainer import ResumableTrainer

if TYPE_CHECKING:
    from rich.console import Console

    from symphony_hf.data.prepared import PreparedData


REPORT = "report.md"
_PACKAGES = ("accelerate", "peft", "trl", "deepspeed", "datasets", "bitsandbytes")


def describe_run(recipe: Recipe, trainer: ResumableTrainer, data: "PreparedData", command: str) -> dict[str, Any]:
    """Return a run's settings, versions, sizes and losses for `results.json`. The final evaluation is added later."""
    state, parameters = trainer.state, list(trainer.model.parameters())
    train = dict(state.log_history[-1])
    mean_loss = trainer.mean_loss()
    if mean_loss is not None:
        train["train_loss"] = mean_loss
    elif trainer.resumed_at:
        train.pop("train_loss", None)  # Trainer's own covers only the steps after the resume
    return {
        "recipe": dataclasses.asdict(recipe),
        "origin": origin_record(recipe.model.path, recipe.data.path),
        "command": command,
        "processes": trainer.accelerator.num_processes,
        "strategy": strategy_of(trainer.accelerator.state),
        "device": _device(trainer.args.device),
        "versions": versions(*_PACKAGES),
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
    """Return all seeds, including those that the recipe leaves at their defaults."""
    arguments = trainer.args
    data = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return {"training": arguments.seed, "data": data, "evaluation": recipe.eval.seed}


def _size(parameter: torch.Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # the full size under ZeRO-3


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def write_run_report(results: Mapping[str, Any], output: Path) -> Path:
    """Write `report.md` from the values of `results.json`, and return its path."""
    page = output / REPORT
    write_text(page, "\n".join(_lines(results, output)) + "\n")
    return page


def _lines(results: Mapping[str, Any], output: Path) -> Iterator[str]:
    recipe, train = results["recipe"], results["train"]
    yield f"# {output.name}"
    yield ""
    if results["command"]:
        yield from ("```bash", results["command"], "```", "")
    rows = [(name.replace("_", " "), _number(value)) for name, value in results["test"].items()]
    yield from ("## Result", "", Table("Result", ("", ""), rows).to_markdown(), "")
    if "seconds" in results:
        since = results.get("seconds_since_step")
        period = "in total" if since is None else f"since step {since}, after which it was resumed"
        loss = f"mean loss {train['train_loss']:.4f}, " if "train_loss" in train else ""
        yield f"Training: {results['steps']} steps, {loss}{results['seconds']:.0f} seconds {period}."
        yield ""
    yield f"Model: `final/`, {_which(results)}. To share it: `symphony push {output} NAMESPACE/NAME`."
    parameters = results["parameters"]
    yield f"Parameters: {parameters['total']:,}, of which {parameters['trained']:,} were trained."
    yield f"Run by {results['processes']} processes, strategy {results['strategy']}, on {results['device']}."
    yield f"Data: {describe_data(recipe['data'])}, revision {results['data']['revision']}."
    yield from (f"- {note}" for note in results["data"]["notes"])
    yield ""
    yield f"Seeds: {', '.join(f'{name} {seed}' for name, seed in results['seeds'].items())}."
    yield ""
    picture = f"{(GraphMonitor if recipe.get('symphony') else RoutingMonitor).stem}{PICTURE}"
    if (output / picture).exists():
        yield from (f"![How often two experts are chosen together, by layer]({picture})", "")
    yield from ("## Settings", "", "```yaml", yaml.safe_dump(_plain(recipe), sort_keys=False).strip(), "```", "")
    yield from ("## Versions", "", ", ".join(f"{name} {version}" for name, version in results["versions"].items()))


def _which(results: Mapping[str, Any]) -> str:
    """Say which step's model was saved."""
    best = results["best_checkpoint"]
    if not best:
        return "after the last step"
    name = f"`{Path(best).name}/`"
    if results["recipe"]["train"].get("load_best_model_at_end"):
        return f"the best by validation, {name}"
    return f"after the last step; best by validation: {name}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Return a value without tuples and settings that are None, which YAML would spell out."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def print_dry_run(
    recipe: Recipe, arguments: TrainingArguments, not_checked: list[str], console: "Console | None" = None
) -> None:
    """Print the plan of a run: model, data, training and output.

    Args:
        recipe: Recipe, from `load_recipe`.
        arguments: Training arguments, from `prepare_dry_run`.
        not_checked: What could not be checked on this machine, from there.
        console: Console to print to.

    Raises:
        SymphonyError: If the model cannot be built, symphonized or adapted.
    """
    from rich.console import Console

    console = console or Console()
    try:
        model = empty_model(recipe)
    except ConfigError as error:
        if recipe.model.config is not None:
            raise
        not_checked = [*not_checked, str(error)]  # the checkpoint is elsewhere
    else:
        add_graph(model, recipe)
        print_inspection(inspect_model(model), console)
        choose_trained(model, recipe.model.trainable)
        add_adapters(model, recipe.peft)
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    rows = {
        "processes, strategy": f"{arguments.world_size}, {expected_strategy(arguments)}",
        "device": str(arguments.device),
        "length": length,
        "optimizer step": f"{per_step} sequences of at most {recipe.data.block_size} tokens",
        "data": _describe_data(recipe),
        **({} if (damage := damage_of(recipe)) is None else {"damage": damage.describe()}),
        "graph": "none: a plain model" if recipe.symphony is None else _describe(recipe.symphony),
        "adapters": "none: all parameters are trained" if recipe.peft is None else _describe(recipe.peft),
        "train": ", ".join(f"{name}: {value}" for name, value in recipe.train.items()),
        "output": recipe.output.directory,
    }
    Table("The run", ("", ""), list(rows.items())).print(console, show_header=False)
    for problem in not_checked:
        console.print(f"Not checked: {problem}", highlight=False, markup=False)
    console.print("This was a dry run: nothing was loaded, trained or written.", highlight=False)


def _describe_data(recipe: Recipe) -> str:
    """Return kind and source, even if they are the defaults, the settings, and the tokenizer."""
    data = recipe.data
    changed = {name: value for name, value in changed_settings(data).items() if name not in ("kind", "path")}
    others = [f"{name}: {value}" for name, value in changed.items() if name not in ("vocab_size", "tokenizer")]
    if recipe.trains_tokenizer:
        others.append(f"a tokenizer trained on it ({data.tokenizer}, at most {data.vocab_size:,} tokens)")
    else:
        others.append(f"the tokenizer of `model.{tokenizer_source(recipe)}`")
    return ", ".join([f"{data.kind}: {describe_data(dataclasses.asdict(data))}", *others])


def _describe(section: Any) -> str:
    return ", ".join(f"{name}: {value}" for name, value in changed_settings(section).items()) or "defaults"
