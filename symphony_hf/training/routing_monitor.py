"""RoutingMonitor: the routing of any MoE in the logs of its training, without a change to the model."""

import base64
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from symphony_hf.diagnostics.graph_metrics import graph_summary
from symphony_hf.diagnostics.routing_metrics import router_margin
from symphony_hf.errors import SymphonyWarning, UnsupportedModelError
from symphony_hf.evaluation.routing.hooks import RouterReader, WatchedRouter, routers_to_watch
from symphony_hf.patching.replay.layout import padding_mask
from symphony_hf.patching.symphonize import is_symphonized
from symphony_hf.routing.graph import count_coselections, initial_adjacency, update_adjacency

from .callback import saved_attributes
from .monitor import HISTORY, GraphMonitor

_SHOWN = ("load_entropy", "dead_experts", "busiest")
"""Metrics of each router; the others are means over all."""

_EVERY = 50
"""Steps between two observations where the trainer does not log by steps."""

_MANY = 2**30
"""Number of observations in the moving average of a checkpoint that does not record it: its decay is the plain one."""


class RoutingMonitor(GraphMonitor, ExportableState):
    """Callback that watches the routers of any MoE in training: `Trainer(model, ..., callbacks=[RoutingMonitor()])`.

    It logs, under `routing/`, the metrics of `diagnostics.graph_metrics.graph_summary` on a moving average of
    co-selections and the mean margin of the choices, as means and for each router, to whatever `report_to` names. It
    draws what GraphMonitor draws, into files whose names begin with `routing_`. The model needs no graph, and stays as
    it is: hooks read the routers in one forward of this process, without padding, at the first step and at each that is
    logged; with `logging_strategy` `epoch` or `no`, at every 50th, and at the first after each log. A log that is added
    for a checkpoint has no metrics if no forward was read since the last. The moving average is saved in a checkpoint's
    trainer_state.json, so that a resumed run logs what an uninterrupted one does.

    Args:
        pictures: Whether to draw, which takes a second or two at each checkpoint and at the end.
        decay: Decay of the moving average, per observation. It begins with the first observation, and the
            first 1 / (1 - decay) of them weigh the same.
    """

    prefix = "routing"
    stem = "routing_"

    def __init__(self, pictures: bool = True, decay: float = 0.9) -> None:
        super().__init__(pictures)
        self.decay = decay
        self._handles: list[Any] = []
        self._readers: dict[str, RouterReader] = {}
        self._graphs: dict[str, Tensor] = {}
        self._num_seen: dict[str, int] = {}
        self._margins: dict[str, Tensor] = {}
        self._counts: dict[str, tuple[Tensor, Tensor]] = {}
        self._mask_T: Tensor | None = None
        self._is_unseen = False
        self._is_new = False

    def graphs_of(self, model: Any) -> dict[str, Tensor]:
        return {name: graph.clone() for name, graph in self._graphs.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._stop_watching()
        self._is_unseen = False
        self._graphs = {
            name: initial_adjacency(router.contract.num_experts, router.contract.top_k, "cpu")
            for name, router in routers_to_watch(model).items()
        }
        self._num_seen = {}
        self._margins = {}
        self._is_new = saved_attributes(self, state).get("is_new", False)
        if seen := saved_attributes(self, state).get("seen"):
            tensors = load(base64.b64decode(seen))
            unknown = dict.fromkeys(self._graphs, _MANY)
            self._num_seen = dict(saved_attributes(self, state).get("num_seen", unknown))
            self._margins = {name: tensors[f"margin/{name}"] for name in self._graphs if f"margin/{name}" in tensors}
            self._graphs = {name: tensors.get(f"graph/{name}", graph) for name, graph in self._graphs.items()}
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def kept_history(self, output: Path, model: Any) -> Path:
        """Return the file with the loads so far: of a stock model, also as the first releases named it."""
        own, first = super().kept_history(output, model), output / HISTORY
        return first if not own.exists() and not is_symphonized(model) else own

    def state(self) -> dict[str, Any]:
        """Return what Trainer saves of this callback in a checkpoint: its tensors as safetensors, in letters."""
        graphs = {f"graph/{name}": graph for name, graph in self._graphs.items()}
        seen = save(graphs | {f"margin/{name}": margin.cpu() for name, margin in self._margins.items()})
        attributes = {"seen": base64.b64encode(seen).decode(), "num_seen": self._num_seen, "is_new": self._is_new}
        return {"args": {"pictures": self.pictures, "decay": self.decay}, "attributes": attributes}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step, by_steps = state.global_step + 1, args.logging_strategy == "steps"
        is_on_grid = step % max(1, int(state.logging_steps if by_steps else _EVERY)) == 0
        if is_on_grid or step == 1 or not (by_steps or self._is_new):  # without a grid, once for each log
            self._watch(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if self._is_unseen:
            warnings.warn(
                "RoutingMonitor: no router was seen to run in training: does a compiled model go past its hooks?",
                SymphonyWarning,
                stacklevel=2,
            )
        if self._is_new:  # not so in a log between two on the grid, which is added before a checkpoint
            self._is_new = False
            super().on_log(args, state, control, model=model, logs=logs, **kwargs)

    def metrics(self, graphs: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, float]:
        values = super().metrics(graphs, before)
        margins = {name: float(margin) for name, margin in self._margins.items()}
        if margins:
            values["margin"] = sum(margins.values()) / len(margins)
        for name, graph in graphs.items():
            own = graph_summary({name: graph})
            values |= {f"{name}/{metric}": own[metric] for metric in _SHOWN}
        return values | {f"{name}/margin": margin for name, margin in margins.items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._stop_watching()
        super().on_train_end(args, state, control, model=model, **kwargs)

    def _watch(self, model: nn.Module) -> None:
        """Read the routers in the next forward."""
        self._stop_watching()
        self._is_unseen = True
        whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
        for name, router in routers_to_watch(model).items():
            self._readers[name] = RouterReader(WatchedRouter(router.module, router.contract))
            hook = lambda module, args, kwargs, output, name=name: self._read(name, args, kwargs, output)  # noqa: E731
            self._handles.append(router.module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(whole.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(whole.register_forward_hook(self._after_forward))

    def _stop_watching(self) -> None:
        for handle in (*self._handles, *self._readers.values()):
            handle.remove()
        self._handles.clear()
        self._readers.clear()
        self._counts.clear()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = padding_mask(kwargs)
        self._mask_T = None if mask is None else mask.reshape(-1).bool()

    @torch.no_grad()
    def _read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits_TE, indices_TK = self._readers[name].read(args, kwargs, output)
        mask_T = self._mask_T if self._mask_T is not None and len(self._mask_T) == len(logits_TE) else None
        counts_EE = count_coselections(indices_TK, logits_TE.shape[-1], mask_T)
        margin_T = router_margin(logits_TE.detach(), indices_TK)
        kept_T = torch.ones_like(margin_T, dtype=torch.bool) if mask_T is None else mask_T.to(margin_T.device)
        self._counts[name] = (counts_EE, kept_T.sum())
        finite = margin_T[kept_T & margin_T.isfinite()]
        self._margins.pop(name, None)
        if len(finite):  # none is where all experts are chosen
            self._margins[name] = finite.mean()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name, (counts_EE, num_tokens) in self._counts.items():
            num_tokens = num_tokens.float().cpu()
            self._num_seen[name] = self._num_seen.get(name, 0) + int(num_tokens > 0)
            decay = min(self.decay, 1 - 1 / max(self._num_seen[name], 1))
            self._graphs[name] = update_adjacency(self._graphs[name], counts_EE.float().cpu(), num_tokens, decay)
        self._is_unseen, self._is_new = not self._counts, self._is_new or bool(self._counts)
        self._stop_watching()


def monitors_of(model: nn.Module) -> list[GraphMonitor]:
    """Return the monitor of a recipe's model: of its graphs, or of the routing of a stock MoE.

    A dense model has none, nor has one whose routers cannot be read.
    """
    if is_symphonized(model):
        return [GraphMonitor()]
    try:
        routers_to_watch(model)
    except UnsupportedModelError:
        return []
    return [RoutingMonitor()]
