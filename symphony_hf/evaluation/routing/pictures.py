"""Pictures of routing diagnostics, drawn from `result.json` and `matrices.safetensors`."""

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
    "graphs.png": "Experts selected together on this text",
    "learned.png": "The co-selection graphs that the model has learned",
    "network.png": "Pairs of experts that are selected together more often than their loads explain",
    "similarity.png": "Similarity of the experts' outputs on the same tokens",
    "allocation.png": "Experts that the tokens of each domain go to",
    "flips.png": "Where routing changes under attack",
    "load.png": "Each expert's load by checkpoint",
    "evolution.png": "The co-selection graphs by checkpoint",
    "saturation.png": "Share of the final routing that each checkpoint has",
}
"""Captions of all pictures, in report order; flips-ATTACK.png if there are several attacks."""


def captioned(folder: Path, result: Mapping[str, Any]) -> dict[str, Path]:
    """Return the pictures of a result in its folder by caption, in report order."""
    return {caption: folder / name for name, caption in _captions_of(result).items() if (folder / name).is_file()}


def picture_names(result: Path) -> list[str]:
    """Return the names of the pictures that may have been drawn of an earlier result; none without it."""
    return list(_captions_of(read_object(result, DataError))) if result.is_file() else []


def _captions_of(result: Mapping[str, Any]) -> dict[str, str]:
    attacks = dict.fromkeys(row["attack"] for row in result.get("corruption") or [])
    captions = {}
    for name, caption in CAPTIONS.items():
        captions[name] = caption
        if name == "flips.png":
            captions |= {f"flips-{attack}.png": f"{caption}: {attack}" for attack in attacks}
    return captions


def draw_observation(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the result of `observe_routing` next to its `matrices.safetensors`. Return the paths of the pictures."""
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
    """Return the allocation by layer and domain: the largest domain first, `other` last."""
    domains = sorted(result["domains"], key=lambda name: (name == "other", -result["domains"][name]))
    layers = {name: result["layers"][name]["allocation"] for name in result["routers"]}
    return {name: {domain: allocation[domain] for domain in domains} for name, allocation in layers.items()}


def _matrices_of(matrices: Mapping[str, Tensor], prefix: str, routers: list[str]) -> dict[str, Tensor]:
    return {name: matrices[prefix + name] for name in routers if prefix + name in matrices}


def _draw_flips(plots: Any, result: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draw one picture per attack."""
    routers = result["routers"]
    attacks = list(dict.fromkeys(row["attack"] for row in result["corruption"] if row["tokens"]))
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
