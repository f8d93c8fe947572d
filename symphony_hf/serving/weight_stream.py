"""Folding of graphs into router weights while an engine reads a checkpoint's tensors one by one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from symphony_hf.checkpoints.graph_files import SUFFIX
from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import FoldError, GraphError
from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.discovery import layer_number
from symphony_hf.routing.graph import adjacency_problems

from .router_names import ROUTERS

_GRAPH = ("symphony.adjacency", "symphony.updates")
_STACKED = (".experts.gate_up_proj", ".experts.down_proj")
"""Ends of the names that transformers' models have for all experts of a layer, where their checkpoints name each."""


@dataclass
class _Router:
    """Tensors of a router that have been read."""

    graph: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    is_folded: bool = False


class WeightStream:
    """Turns the tensors of a Symphony checkpoint into those of its folded form, which a stock model class loads.

    Args:
        config: Config of the checkpoint, as the engine read it.
        architecture: Name of the family's model class in Transformers.

    Raises:
        ConfigError: If the checkpoint's settings are invalid.
        FoldError: If the family has no names in `ROUTERS`, the config has no settings, or they do not fold.
    """

    def __init__(self, config: Any, architecture: str) -> None:
        if architecture not in ROUTERS:
            raise FoldError(
                f"{architecture}: symphony_hf serves unfolded checkpoints of {', '.join(ROUTERS)}: serve this one "
                "folded, from `symphony_hf.export_folded`"
            )
        stored = getattr(config, "symphony", None)
        if stored is None:
            raise FoldError(f"{architecture}: config.json has no `symphony` settings: restore it as it was saved")
        if getattr(config, "upcycled", None) is not None:
            raise FoldError(
                f"{architecture}: config.json records modules of `upcycle_modules`, which no engine has: use "
                "transformers"
            )
        self.settings = SymphonyConfig.from_stored(stored, where="config.json: symphony")
        if self.settings.smoothing != "logits":
            raise FoldError(
                f"{architecture}: this checkpoint smooths scores, after softmax, which no engine's router computes: "
                "only smoothing=`logits` can be served; use transformers"
            )
        self.names = ROUTERS[architecture]

    def fold(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the folded form. A router's weight is held back until its graph has come.

        Args:
            weights: Names and tensors of a whole checkpoint, in any order. A router's weight and its graph must come in
                the same call.

        Raises:
            GraphError: If a graph is missing or invalid, or has no router.
            FoldError: If a router's weight is quantized, or the names are those of the model in memory, as in a
                training checkpoint.
        """
        routers: dict[str, _Router] = {}
        for name, tensor in weights:
            router_name, part = self._split(name)
            if part is None:
                yield name, tensor
                continue
            router = routers.setdefault(router_name, _Router())
            tensors = router.graph if part in _GRAPH else router.parameters
            tensors[part] = tensor.clone()  # some readers reuse their buffers
            if len(router.graph) == len(_GRAPH):
                for part in list(router.parameters):
                    yield f"{router_name}.{part}", self._smooth(router_name, router.graph, router.parameters.pop(part))
                    router.is_folded = True
        if not any(router.graph for router in routers.values()):
            raise GraphError(f"the weights hold no expert graph (no tensor is named `*.{self.names.router}{SUFFIX}`)")
        for router_name, router in routers.items():
            self._check_whole(router_name, router)
            for part, parameter in router.parameters.items():  # of a layer that was not symphonized
                yield f"{router_name}.{part}", parameter

    def _split(self, name: str) -> tuple[str, str | None]:
        """Return a router's name and the name of its tensor within it, which is None for all other tensors."""
        in_model = self.names.in_model
        if name.endswith(_STACKED) or (in_model is not None and f".{in_model}." in name):
            raise FoldError(
                f"`{name}` is a name of the model in memory, as in Trainer's `checkpoint-N`, which engines do not "
                "know: serve the run's `final/`, or load the folder with transformers and save it under another name"
            )
        layer, found, part = name.rpartition(f".{self.names.router}.")
        if found and part in (*_GRAPH, *self.names.parameters):
            return f"{layer}.{self.names.router}", part
        if ".symphony." in name:
            raise GraphError(f"`{name}`: the graphs of this family are expected at `*.{self.names.router}{SUFFIX}`")
        return name, None

    def _smooth(self, name: str, stored: dict[str, Tensor], parameter: Tensor) -> Tensor:
        """Return a router's weight or bias with its graph folded in, in its own dtype."""
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise FoldError(f"the weight of `{name}` is quantized ({parameter.dtype}): load it in 16 bits or more")
        adjacency_EE, updates = (stored[part].to(parameter.device) for part in _GRAPH)
        problems = adjacency_problems(adjacency_EE, parameter.shape[0])
        if updates.numel() != 1 or int(updates) < 0:
            problems.append(f"{updates.tolist()}, where a number of updates was expected")
        if problems:
            raise GraphError(f"the expert graph of `{name}` is not usable: {'; '.join(problems)}")
        with torch.no_grad():
            graph = ExpertGraph(parameter.shape[0], 1, self.settings, parameter.device)
            graph.adjacency.copy_(adjacency_EE)
            graph.updates.copy_(updates.reshape(()))
            return graph(parameter)

    def _check_whole(self, name: str, router: _Router) -> None:
        """Raise GraphError for a router whose graph or weight has not come."""
        layers, patterns = self.settings.layers, self.settings.routers
        in_model = name.removesuffix(self.names.router) + (self.names.in_model or self.names.router)
        is_left_out = (layers is not None and layer_number(name, -1) not in layers) or (
            patterns is not None and not any(fnmatchcase(in_model, pattern) for pattern in patterns)
        )
        if router.is_folded or (is_left_out and not router.graph):
            return
        come = {*router.graph, *router.parameters}
        missing = [f"{name}.{part}" for part in (*_GRAPH, self.names.parameters[0]) if part not in come]
        raise GraphError(f"the weights lack {', '.join(missing)}: a router's weight and its graph must come together")
