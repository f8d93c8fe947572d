"""SymphonyLightningCallback: updates the graphs in Lightning's Trainer, and logs the router losses.

    from symphony_hf.training.lightning import SymphonyLightningCallback
    lightning.Trainer(callbacks=[SymphonyLightningCallback()])

It stands alone because it is the only file that imports Lightning.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from symphony_hf.patching.attachment import tracker_of


class SymphonyLightningCallback(Callback):
    """Callback for a LightningModule that holds a symphonized model and returns the loss of its forward.

    Raises:
        PatchError: At the start of training, if no model in the module is symphonized.
    """

    _steps = 0

    _tracker: Any = None
    _resumed_loads: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning saves of this callback in a checkpoint: the load of the last step."""
        return {"last_loads": {} if self._tracker is None else self._tracker.state.saved_loads()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the load of the last step from the checkpoint that is resumed, once training starts."""
        self._resumed_loads = state_dict["last_loads"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tracker = tracker_of(pl_module)
        self._tracker.settle_alone()
        self._tracker.state.begin_training()
        self._tracker.state.restore_loads(self._resumed_loads or {})
        self._resumed_loads = None
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._steps:
            return  # gradients are being accumulated
        self._steps = trainer.global_step
        tracker = tracker_of(pl_module)
        tracker.commit()
        every = trainer.log_every_n_steps  # 0 for no logs
        if every and self._steps % every == 0:
            tracker.checks.warn_about_skipped()
            losses = tracker.state.take_losses()
            pl_module.log_dict({f"symphony/{name}": value for name, value in losses.items()})
