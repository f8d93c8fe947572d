"""The pictures of an observation, from its `result.json` and `matrices.safetensors` alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from symphony_hf.diagnostics.labels import short_names
from symphony_hf.errors import DataError
from symphony_hf.files import read_object

CAPTIONS = {
    "graphs.png": "Experts chosen together by this text",
    "learned.png": "The graphs that the model has learned",
    "network.png": "The pairs of experts that are chosen together beyond what their loads explain",
    "similarity.png": "How alike experts are in what they make of the same tokens",
    "allocation.png": "Which experts the tokens of each domain go to",
    "flips.png": "Where routing changes under attack",
    "load.png": "Each expert's load, checkpoint by checkpoint",
    "evolution.png": "The graphs of experts, checkpoint by checkpoint",
    "saturation.png": "How much of its final routing each checkpoint has",
}
"""Of every picture that there may be, in the order of a report; flips-ATTACK.png where there are several attacks."""


def captioned(folder: Path) -> dict[str, Path]:
    """The pictures in an observation's folder by what they show, in the order of a report."""
    found = {}
    for name, caption in CAPTIONS.items():
        if (folder / name).is_file():
            found[caption] = folder / name
        for path in sorted(folder.glob(name.replace(".png", "-*.png"))):
            found[f"{caption}: {path.stem.partition('-')[2]}"] = path
    return found


def picture_names(result: Path) -> list[str]:
    """Return the names of the pictures that may have been drawn of an earlier result; none without it."""
    if not result.is_file():
        return []
    attacks = {row["attack"] for row in read_object(result, DataError).get("corruption") or []}
    return [*CAPTIONS, *(f"flips-{attack}.png" for attack in attacks)]


def draw_observation(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what `observe_routing` found, into the folder of its result.

    Args:
        result: Contents of `result.json`.
        folder: Where `matrices.safetensors` is, and the pictures go.

    Returns:
        Their paths.
    """
    # disable=None: no bar where the output is not a terminal, such as a log file.
    return list(tqdm(_draw(result, folder), desc="Drawing", unit=" pictures", delay=2, disable=None))


def _draw(result: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    from symphony_hf.diagnostics import plots  # matplotlib is slow to import

    matrices, routers = load_file(folder / "matrices.safetensors"), result["routers"]
    graphs = _matrices_of(matrices, "coselection/", routers)
    yield plots.plot_graphs(graphs, folder / "graphs.png")
    yield plots.plot_expert_network(graphs, folder / "network.png")
    learned = _matrices_of(matrices, "learned/", routers)
    if learned:
        yield plots.plot_graphs(learned, folder / "learned.png")
    similarities = _matrices_of(matrices, "similarity/", routers)
    if similarities:
        yield plots.plot_similarity(similarities, folder / "similarity.png")
    if len(result["domains"]) > 1:
        top_k = {name: result["layers"][name]["top_k"] for name in routers}
        yield plots.plot_allocation(_allocation(result), top_k, folder / "allocation.png")
    yield from _draw_flips(plots, result, folder)
    if len(result["checkpoints"]) > 1:
        yield from _draw_checkpoints(plots, result, matrices, folder)


def _allocation(result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By layer and domain: the largest domain first, the rest last."""
    domains = sorted(result["domains"], key=lambda name: (name == "other", -result["domains"][name]))
    layers = {name: result["layers"][name]["allocation"] for name in result["routers"]}
    return {name: {domain: allocation[domain] for domain in domains} for name, allocation in layers.items()}


def _matrices_of(matrices: Mapping[str, Tensor], prefix: str, routers: list[str]) -> dict[str, Tensor]:
    return {name: matrices[prefix + name] for name in routers if prefix + name in matrices}


def _draw_flips(plots: Any, result: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """One plan an attack."""
    routers = result["routers"]
    attacks = list(dict.fromkeys(row["attack"] for row in result["corruption"]))
    for attack in attacks:
        rows = [row for row in result["corruption"] if row["attack"] == attack]
        hardest = max(rows, key=lambda row: row["severity"])
        by_severity = {name: [row["per_layer"][name] for row in rows] for name in routers}
        suffix = f" (severity {hardest['severity']})"
        panels = {
            "severity": ([str(row["severity"]) for row in rows], by_severity),
            "tokens since the last edit" + suffix: (result["distances"], _in_order(hardest["by_distance"], routers)),
            "kind of token" + suffix: (result["classes"], _in_order(hardest["by_class"], routers)),
        }
        name = "flips.png" if len(attacks) == 1 else f"flips-{attack}.png"
        yield plots.plot_flips(panels, f"Where routing changes under {attack}", folder / name)


def _in_order(values: Mapping[str, Any], routers: list[str]) -> dict[str, Any]:
    return {name: values[name] for name in routers}


def _draw_checkpoints(
    plots: Any, result: Mapping[str, Any], matrices: Mapping[str, Tensor], folder: Path
) -> Iterator[Path]:
    routers, checkpoints = result["routers"], result["checkpoints"]
    names = short_names([checkpoint["source"] for checkpoint in checkpoints])
    loads = {name: [checkpoint["load"][name] for checkpoint in checkpoints] for name in routers}
    saturation = {name: [checkpoint["saturation"][name] for checkpoint in checkpoints] for name in routers}
    chances = {layer["top_k"] / layer["num_experts"] for layer in result["layers"].values()}
    graphs = [
        _matrices_of(matrices, f"checkpoint/{number}/coselection/", routers) for number in range(len(checkpoints))
    ]
    chance = chances.pop() if len(chances) == 1 else None
    yield plots.plot_load_history(loads, names, folder / "load.png")
    yield plots.plot_graph_evolution(graphs, names, folder / "evolution.png")
    yield plots.plot_saturation(saturation, names, folder / "saturation.png", chance)
