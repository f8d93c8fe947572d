"""One progress bar for a training run, with its last values at the end of the bar."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {"loss": "loss", "eval_loss": "validation", "symphony/balance_loss": "balance"}


class StepProgress(ProgressCallback):
    """Trainer's own bar, without a printed dictionary at each log and a second bar at each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None:
            return
        values = {_SHOWN[name]: f"{value:.3f}" for name, value in (logs or {}).items() if name in _SHOWN}
        self._values.update(values)
        self.training_bar.set_postfix(self._values)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar: it is over before one could be read."""
