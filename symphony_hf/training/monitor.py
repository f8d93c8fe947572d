"""GraphMonitor: metrics of the graphs in every log, and pictures at every checkpoint, for any tracker."""

import itertools
import os
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_hf.diagnostics.graph_metrics import graph_summary
from symphony_hf.errors import SymphonyWarning
from symphony_hf.files import replacing
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.symphonize import expert_graphs, symphony_routers

from .callback import add_to_log, move_to_front
from .zero import gathered


class LoadHistory:
    """Expert loads at up to `MAX_STEPS` evenly spaced steps. When there are more, every second one is dropped.

    `loads` has, for each router, one tensor per step: shares that sum to 1, float32, on the CPU. Shape: (num_experts,).
    """

    MAX_STEPS = 256

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.loads: dict[str, list[Tensor]] = {}

    def add(self, step: int, graphs: Mapping[str, Tensor]) -> None:
        """Add the loads of the graphs at a step, and drop those of later steps."""
        self.cut(step - 1)
        if len(self.steps) > 2 and self.steps[-1] - self.steps[-2] < self._gap():
            self._keep(slice(-1))  # it was kept only as the last one
        self.steps.append(step)
        for name, adjacency_EE in graphs.items():
            load_E = adjacency_EE.diagonal().float()
            self.loads.setdefault(name, []).append((load_E / load_E.sum()).cpu())
        if len(self.steps) > self.MAX_STEPS:
            self._keep(slice((len(self.steps) - 1) % 2, None, 2))  # keeps the last one

    def _gap(self) -> float:
        """Return the typical distance between two steps. The last step may be closer."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.steps[:-1]))

    def _keep(self, which: slice) -> None:
        self.steps = self.steps[which]
        self.loads = {name: rows[which] for name, rows in self.loads.items()}

    def cut(self, step: int) -> None:
        """Drop what came after a step."""
        self._keep(slice(sum(own <= step for own in self.steps)))

    def write(self, path: Path) -> None:
        """Write the history to a file, atomically."""
        tensors = {f"load/{name}": torch.stack(rows) for name, rows in self.loads.items()}
        with replacing(path) as written:
            written.write_bytes(save({"steps": torch.tensor(self.steps), **tensors}))

    @classmethod
    def read(cls, path: Path) -> "LoadHistory":
        """Read a history from a file. If it is damaged, the history is empty, with a SymphonyWarning."""
        history = cls()
        try:
            tensors = load(path.read_bytes())
            history.steps = tensors.pop("steps").tolist()
        except (SafetensorError, KeyError) as error:
            warnings.warn(f"{path}: damaged, so the load history starts anew ({error})", SymphonyWarning, stacklevel=2)
            return cls()
        history.loads = {name.removeprefix("load/"): list(rows) for name, rows in tensors.items()}
        return history


PICTURE = "graphs.png"
LOAD_PICTURE = "load.png"
HISTORY = "load_history.safetensors"


class GraphMonitor(TrainerCallback):
    """Callback that logs metrics of the graphs and draws them: `Trainer(..., callbacks=[..., GraphMonitor()])`.

    The metrics are those of `diagnostics.graph_metrics.graph_summary`, and are reported with the loss. The pictures are
    `graphs.png` and `load.png` (each expert's load over time) in the output directory, and images in TensorBoard, W&B
    or Trackio if `report_to` names them. The loads themselves are in `load_history.safetensors`. A log costs under 2 ms
    for 16 layers of 64 experts on one CPU core.

    Args:
        pictures: Whether to draw, which takes a second or two at each checkpoint and at the end.
    """

    prefix = "symphony"
    stem = ""
    """Beginning of the names of its files."""

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self._logged: dict[str, Tensor] | None = None
        self._history = LoadHistory()

    def graphs_of(self, model: Any) -> dict[str, Tensor]:
        """Return the graph of each router. Every rank must call it: partitioned graphs are gathered."""
        with gathered([active_graph(router.symphony).adjacency for _, router in symphony_routers(model)]):
            return expert_graphs(model)

    def kept_history(self, output: Path, model: Any) -> Path:
        """Return the file with the loads that a run has logged so far."""
        return output / f"{self.stem}{HISTORY}"

    def metrics(self, graphs: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, float]:
        """Return the values to log.

        Args:
            graphs: The graph of each router.
            before: As of the last log.
        """
        return graph_summary(graphs, before)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        move_to_front(self)
        self._logged = self.graphs_of(model)  # in a resumed run, as of its last log before the checkpoint
        self._history, kept = LoadHistory(), self.kept_history(Path(args.output_dir), model)
        if state.global_step and state.is_world_process_zero and kept.is_file():
            self._history = LoadHistory.read(kept)
            self._history.cut(state.global_step)

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
            return  # an evaluation's entry, or the summary at the end
        graphs = self.graphs_of(model)
        add_to_log(self.metrics(graphs, self._logged), logs, state, self.prefix)
        self._logged = graphs
        if state.is_world_process_zero:
            self._history.add(state.global_step, graphs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        graphs = self.graphs_of(model) if self.pictures else {}  # of all ranks: under FSDP2 it gathers
        if not state.is_world_process_zero:
            return
        output, history = Path(args.output_dir), self._history
        if history.steps:
            history.write(output / f"{self.stem}{HISTORY}")
        if not self.pictures:
            return
        from symphony_hf.diagnostics import plots  # matplotlib is slow to import

        pictures = [plots.plot_graphs(graphs, output / f"{self.stem}{PICTURE}")]
        if len(history.steps) > 1:
            loads = {name: torch.stack(rows).tolist() for name, rows in history.loads.items()}
            steps = [str(step) for step in history.steps]
            pictures.append(plots.plot_load_history(loads, steps, output / f"{self.stem}{LOAD_PICTURE}"))
        for tracker in args.report_to or ():
            for picture in pictures:
                if tracker in _SENDERS:
                    _SENDERS[tracker](picture, args, state.global_step)

    on_train_end = on_save


def _to_tensorboard(picture: Path, args: TrainingArguments, step: int) -> None:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    # Beside the scalars, which Trainer's callback writes to this folder of the environment's.
    folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", Path(args.output_dir) / "runs")).expanduser()
    with SummaryWriter(str(folder / "graphs")) as writer, Image.open(picture) as image:
        writer.add_image(f"symphony/{picture.stem}", np.asarray(image), step, dataformats="HWC")


def _to_wandb(picture: Path, args: TrainingArguments, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({f"symphony/{picture.stem}": wandb.Image(str(picture)), "train/global_step": step})


def _to_trackio(picture: Path, args: TrainingArguments, step: int) -> None:
    import trackio

    trackio.log({f"symphony/{picture.stem}": trackio.Image(str(picture)), "train/global_step": step})


_SENDERS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}
