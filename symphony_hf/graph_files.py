"""Expert graphs read from safetensors files, and nothing believed before it was checked."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import GraphError
from .routing import adjacency_problems

SUFFIX = ".symphony.adjacency"
_INDEX = "model.safetensors.index.json"


def read_graphs(path: str | Path) -> dict[str, Tensor]:
    """Read the adjacencies, and nothing else, from a Symphony checkpoint.

    Args:
        path: A folder with `model.safetensors`, or with shards and their index, or one .safetensors file.

    Returns:
        Router name, as in the file, -> adjacency as stored.

    Raises:
        GraphError: If the path is missing, no safetensors, truncated, or holds no graph.
    """
    path = Path(path)
    if not path.exists():
        raise GraphError(f"graph: `{path}` does not exist: give a Symphony checkpoint, or one of ema, frozen, learned")
    graphs: dict[str, Tensor] = {}
    for file in checkpoint_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name.endswith(SUFFIX):
                        graphs[name.removesuffix(SUFFIX)] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise GraphError(f"graph: `{file}` cannot be read as safetensors ({error}): is it truncated?") from error
    if not graphs:
        raise GraphError(f"graph: `{path}` holds no expert graph (no tensor is named `*{SUFFIX}`)")
    return graphs


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them in its own folder.

    Args:
        path: A folder, or one file.

    Raises:
        GraphError: If one is missing, or the index of the shards is none.
    """
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise GraphError(f"graph: `{index}` is no index of safetensors shards ({error!r})") from error
        files = [path / Path(str(name)).name for name in names]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise GraphError(f"graph: `{file}` does not exist")
    return files


def match_graphs(graphs: Mapping[str, Tensor], routers: Sequence[tuple[str, int]], where: str) -> list[Tensor]:
    """Bring graphs in the order of a model's routers, and check each.

    Args:
        graphs: What `read_graphs` returned. On disk a router may have another name (Mixtral's is
            `block_sparse_moe.gate` there, `mlp.gate` in the model): then they go by the order of the layers.
        routers: (name, number of experts) of each router.
        where: The path, for error messages.

    Raises:
        GraphError: If they are not as many as the routers, or one is not a social graph of that many experts.
    """
    names = [name for name, _ in routers]
    if all(name in graphs for name in names):
        ordered = [(name, graphs[name]) for name in names]
    elif len(graphs) == len(names):
        ordered = sorted(graphs.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])])
    else:
        missing = [name for name in names if name not in graphs]
        raise GraphError(f"graph: `{where}` has no graph for {', '.join(missing)}; it has {', '.join(sorted(graphs))}")
    problems = [
        f"{stored}{SUFFIX}: {'; '.join(found)}"
        for (stored, adjacency), (_, num_experts) in zip(ordered, routers, strict=True)
        if (found := adjacency_problems(adjacency, num_experts))
    ]
    if problems:
        raise GraphError(f"graph: `{where}` is not usable: {' | '.join(problems)}")
    return [adjacency.float() for _, adjacency in ordered]
