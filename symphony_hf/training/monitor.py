"""The graphs while they are learned: numbers in every log and pictures at every checkpoint, in whichever tracker."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..diagnostics import graph_summary
from ..patching import expert_graphs

PICTURE = "graphs.png"


class GraphMonitor(TrainerCallback):
    """Adds numbers on the graphs to Trainer's logs, and draws them: `Trainer(..., callbacks=[..., GraphMonitor()])`.

    The numbers, of `diagnostics.graph_summary`, go wherever `report_to` sends the loss, if this callback comes before
    the reporting ones. The picture is `graphs.png` in the output directory, and an image in TensorBoard, W&B or
    Trackio where `report_to` names them.

    Args:
        pictures: Whether to draw. It takes about a second, at each checkpoint and at the end.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self._logged: dict[str, Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._logged = expert_graphs(model)  # of a run that goes on: as at its last log, before the checkpoint

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
            return  # an evaluation's record, or the summary at the end
        graphs = expert_graphs(model)
        values = {f"symphony/{name}": value for name, value in graph_summary(graphs, self._logged).items()}
        self._logged = graphs
        # Trainer made its record of this log before it called us: add to both.
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._draw(args, state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._draw(args, state, model)

    def _draw(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        if not self.pictures or not state.is_world_process_zero:
            return
        from ..diagnostics import plots  # matplotlib is slow to import

        picture = plots.plot_graphs(expert_graphs(model), Path(args.output_dir) / PICTURE)
        for tracker in args.report_to or ():
            if tracker in _SENDERS:
                _SENDERS[tracker](picture, args, state.global_step)


def _to_tensorboard(picture: Path, args: TrainingArguments, step: int) -> None:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(args.output_dir) / "runs" / "graphs")) as writer, Image.open(picture) as image:
        writer.add_image("symphony/graphs", np.asarray(image), step, dataformats="HWC")


def _to_wandb(picture: Path, args: TrainingArguments, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({"symphony/graphs": wandb.Image(str(picture)), "train/global_step": step})


def _to_trackio(picture: Path, args: TrainingArguments, step: int) -> None:
    import trackio

    trackio.log({"symphony/graphs": trackio.Image(str(picture)), "train/global_step": step})


_SENDERS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}
