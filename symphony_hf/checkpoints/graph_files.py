"""Expert graphs in safetensors files, checked before they are used."""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from symphony_hf.errors import GraphError, NoGraphError
from symphony_hf.files import WEIGHTS, WEIGHTS_INDEX, read_weight_map
from symphony_hf.routing.graph import adjacency_problems

SUFFIX = ".symphony.adjacency"


def read_graphs(path: str | Path) -> dict[str, Tensor]:
    """Read the adjacencies of a Symphony checkpoint, and no other tensors.

    Args:
        path: Folder with `model.safetensors` or with shards and their index, or one .safetensors file.

    Returns:
        Stored adjacency of each router, by the router's name in the file.

    Raises:
        GraphError: If the path does not exist, or its files are truncated or not safetensors.
        NoGraphError: If it holds no graph.
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
        raise NoGraphError(f"graph: `{path}` holds no expert graph (no tensor is named `*{SUFFIX}`)")
    return graphs


def read_usable_graphs(path: Path, command: str) -> dict[str, Tensor]:
    """Read the graphs of a checkpoint or an adapter by router, named as in the model itself.

    Raises:
        GraphError: As `read_graphs`; also, with a message that begins with the command, for a graph with impossible
            values.
    """
    graphs = read_graphs(path)
    for name, graph in graphs.items():
        problems = adjacency_problems(graph, graph.shape[0] if graph.ndim else 0)
        if problems:
            raise GraphError(f"{command}: the graph of `{name}` in `{path}` is not usable: {'; '.join(problems)}")
    return {re.sub(r"^base_model\.model\.", "", name): graph for name, graph in graphs.items()}


def checkpoint_files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint's folder or file, all of which are in its own folder.

    `model.safetensors` takes precedence over an index of shards, as in transformers, whose `save_pretrained` deletes
    neither.

    Raises GraphError if a file is missing, or the index of the shards cannot be read.
    """
    if path.is_file():
        return [path]
    index = path / WEIGHTS_INDEX
    if index.exists() and not (path / WEIGHTS).exists():
        files = [path / name for name in sorted(set(read_weight_map(index, GraphError).values()))]
    else:
        files = [path / WEIGHTS]
    for file in files:
        if not file.exists():
            raise GraphError(f"graph: `{file}` does not exist")
    return files


def match_graphs(graphs: Mapping[str, Tensor], routers: Sequence[tuple[str, int]], where: str) -> list[Tensor]:
    """Return the graphs in the order of a model's routers, given by name and number of experts, each one checked.

    A router may have another name on disk (Mixtral's is `block_sparse_moe.gate` there and `mlp.gate` in the model); it
    is then matched by the numbers in its name.

    Raises:
        GraphError: If a router has no graph, or its graph is not a co-selection graph of that many experts.
    """
    on_disk = _names_on_disk(graphs, [name for name, _ in routers])
    missing = [name for name, _ in routers if name not in on_disk]
    if missing:
        raise GraphError(f"graph: `{where}` has no graph for {', '.join(missing)}; it has {', '.join(sorted(graphs))}")
    problems = [
        f"{on_disk[name]}{SUFFIX}: {'; '.join(found)}"
        for name, num_experts in routers
        if (found := adjacency_problems(graphs[on_disk[name]], num_experts))
    ]
    if problems:
        raise GraphError(f"graph: `{where}` is not usable: {' | '.join(problems)}")
    return [graphs[on_disk[name]].float() for name, _ in routers]


def _names_on_disk(graphs: Collection[str], names: Sequence[str]) -> dict[str, str]:
    """Return the stored name of each router's graph: the router's own name, or one with the same numbers in it.

    Of several such names (`layers.1.mlp.text_moe.gate` and `vision_moe.gate`), the one with the longest common end.
    """
    found = {name: name for name in names if name in graphs}
    renamed = [name for name in graphs if name not in found]
    for name in (name for name in names if name not in found):
        ends = {stored: _common_end(stored, name) for stored in renamed if _numbers(stored) == _numbers(name)}
        nearest = [stored for stored, end in ends.items() if end == max(ends.values())]
        if len(nearest) == 1:
            found[name] = nearest[0]
    takers = Counter(found.values())
    return {name: stored for name, stored in found.items() if takers[stored] == 1}


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _common_end(a: str, b: str) -> int:
    """Return the number of dotted parts that two names have in common at their ends."""
    words = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], words))
