"""Reader of the results of `symphony train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from symphony_hf.checkpoints.graph_files import read_usable_graphs
from symphony_hf.data.glue import describe_data
from symphony_hf.errors import NoGraphError, ReportError
from symphony_hf.files import ADAPTER_WEIGHTS, read_object

from .runs import Cost, Level, Run, flat
from .tables import show


def read_run_graphs(model: Path) -> dict[str, Tensor]:
    """Read the graphs of a checkpoint or an adapter by router; empty if it has none. Invalid ones raise GraphError."""
    adapter = model / ADAPTER_WEIGHTS
    if not model.exists():
        return {}
    try:
        return read_usable_graphs(adapter if adapter.exists() else model, "report")
    except NoGraphError:
        return {}


Points = list[tuple[float, float]]


def read_training_run(folder: Path, results: Mapping[str, Any]) -> Run:
    """Read a folder with `results.json`, and the model in `final/`."""
    recipe = results["recipe"]
    unit = "windows" if recipe.get("eval", {}).get("context") else "documents"
    levels = list(_levels(results["test"], unit))
    curves = _curves(folder, results)
    settings = flat({name: recipe[name] for name in recipe if name != "output"})  # the folder makes no difference
    for name in ("processes", "strategy", "device"):
        settings[name] = results[name]
    return Run(
        folder=folder,
        kind="training run",
        about=_about(results),
        findings=[*_describe_levels(levels, results["test"]), *_describe_losses(curves, int(results["steps"]))],
        settings=settings,
        levels=levels,
        curves={"": curves},
        graphs={"": graphs} if (graphs := read_run_graphs(folder / "final")) else {},
        costs=[_cost(results)],
        seconds=float(results["seconds"]),
        parameters=int(results["parameters"]["total"]),
        versions=results["versions"],
        command=str(results["command"]),
    )


def _about(results: Mapping[str, Any]) -> str:
    recipe = results["recipe"]
    model, data, symphony = recipe["model"], recipe["data"], recipe["symphony"]
    name = model["path"] or model["config"]["model_type"]
    graph = "without a graph" if symphony is None else f"strength {symphony['strength']:g}"
    trained = "LoRA" if recipe.get("peft") else "whole model"
    return f"{name}, {graph}, {trained}, {results['steps']} steps on {describe_data(data)}"


def _levels(test: Mapping[str, Any], unit: str) -> Sequence[Level]:
    if "clean" in test:
        texts = [text for text in ("clean", "attacked") if text in test]  # without words, text is not attacked
        return [_level(test, text, "perplexity", text, test["documents"], unit) for text in texts]
    names = [name for name in ("loss", "perplexity", "accuracy") if name in test]
    return [
        _level(test, name, name, test["split"], test.get("questions") if name == "accuracy" else None, "questions")
        for name in names
    ]


def _level(test: Mapping[str, Any], key: str, metric: str, text: str, number: Any, unit: str) -> Level:
    low, high = (test.get(f"{key}_{end}") for end in ("low", "high"))
    return Level("", metric, text, float(test[key]), low, high, number, unit)


def _describe_levels(levels: Sequence[Level], test: Mapping[str, Any]) -> list[str]:
    if "clean" in test:
        clean, *others = levels
        held_out = "held-out " if clean.unit == "documents" else ""
        found = f"Perplexity {clean.value:.2f} on {clean.number} {held_out}{clean.unit}"
        for attacked in others:
            ratio = attacked.value / clean.value
            found += f"; {attacked.value:.2f} with words replaced by AAA, {ratio:.2f} times as high"
        return [f"{found}.", *(f"Note: {test[name]}." for name in ("note",) if name in test)]
    if not levels:
        return ["There was no held-out data to measure on."]
    values = ", ".join(f"{level.metric} {show(level.value, level.metric)}" for level in levels)
    return [f"On the {test['split']} split: {values}."]


def _describe_losses(curves: Mapping[str, Points], steps: int) -> list[str]:
    train = curves.get("train")
    if not train or len(train) < 2:
        return []
    first, last = train[0][1], train[-1][1]
    return [f"Training loss went from {first:.3f} to {last:.3f} nats per token in {steps} steps."]


def _curves(folder: Path, results: Mapping[str, Any]) -> dict[str, Points]:
    """Return the `train` and `eval` losses; if the results have none, those of the newest checkpoint."""
    losses = results.get("losses")
    if losses is None:
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        history = read_object(states[-1], ReportError)["log_history"] if states else []
        losses = [entry for entry in history if "loss" in entry]
    return {
        "train": [(float(entry["step"]), float(entry["loss"])) for entry in losses],
        "eval": [(float(entry["step"]), float(entry["eval_loss"])) for entry in results["validation"]],
    }


def _cost(results: Mapping[str, Any]) -> Cost:
    train, steps = results["train"], int(results["steps"])
    seconds = train.get("train_runtime")
    # The runtime of a resumed run is that of its last part.
    resumed = results["recipe"]["train"].get("resume_from_checkpoint")
    memory = {
        name.removeprefix("train_").replace("_", " "): float(value)
        for name, value in train.items()
        if "_mem_" in name and name.endswith("peaked_delta")
    }
    return Cost("", steps, float(seconds) / steps if seconds and steps and not resumed else None, memory)
