"""The graphs of experts that a run's model has."""

import re
from pathlib import Path

from torch import Tensor

from ..errors import GraphError, NoGraphError
from ..graph_files import read_graphs
from ..routing import adjacency_problems


def read_run_graphs(model: Path) -> dict[str, Tensor]:
    """Those of a checkpoint or an adapter, by router; empty where the model has none, as of a run without graphs.

    Raises:
        GraphError: If a file is not whole, or what it has is no graph.
    """
    adapter = model / "adapter_model.safetensors"
    if not model.exists():
        return {}
    try:
        graphs = read_graphs(adapter if adapter.exists() else model)
    except NoGraphError:
        return {}
    for name, graph in graphs.items():
        problems = adjacency_problems(graph, graph.shape[0] if graph.ndim else 0)
        if problems:
            raise GraphError(f"report: the graph of `{name}` in `{model}` is not usable: {'; '.join(problems)}")
    return {re.sub(r"^base_model\.model\.", "", name): graph for name, graph in graphs.items()}
