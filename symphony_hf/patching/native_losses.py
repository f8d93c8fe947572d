"""Router losses of a model's own, switched off where a Symphony loss replaces them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.config import SymphonyConfig

from .training_state import TrainingState

_REPLACED = {
    "balances": (("router_aux_loss_coef", "aux_loss_coef"), ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")),
    "z_loss_weight": (("router_z_loss_coef",), ("z_loss", "encoder_z_loss", "decoder_z_loss")),
}
"""For each setting, the names of the native loss's weight in models and configs, and its names in outputs."""


class NativeLosses:
    """Hooks that keep native router losses out of a model's loss.

    Their weights are 0 while a forward with labels runs, and only then: outside it, the model and its config show the
    user's values, and every way to save the config writes them. In training mode, and in evaluations once training has
    begun, the output's losses are 0, too, since trainers such as TRL's add them to a loss of their own in both. Before
    that, in a copy of the model, and after `unsymphonize` they are as it computes them.

    Args:
        weights: Names of the weights in the model and its config.
        outputs: Names of the native losses in the model's output.
        labels_position: Position of `labels` in the model's forward.
        state: The training state of the whole model, which knows whether training has begun.
    """

    def __init__(self, weights: list[str], outputs: list[str], labels_position: int, state: TrainingState) -> None:
        self.weights = weights
        self.outputs = outputs
        self.labels_position = labels_position
        self.state = state
        self._switched_off: list[tuple[Any, str, float]] = []
        self._handles: list[Any] = []

    def attach(self, model: PreTrainedModel) -> None:
        """Register the hooks on a model."""
        self._handles.append(model.register_forward_pre_hook(self.switch_off, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self.restore, always_call=True))

    def remove(self) -> None:
        """Remove the hooks."""
        self.put_back()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def put_back(self) -> None:
        """Restore the weights. A KeyboardInterrupt in a forward passes by the hook that does."""
        while self._switched_off:
            holder, name, weight = self._switched_off.pop()
            setattr(holder, name, weight)

    def switch_off(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        """Set the weights to 0: a pre-hook. Some models read them from their config, most from themselves."""
        if kwargs.get("labels") is None and len(args) <= self.labels_position:
            return  # no loss, and setting an attribute of a config takes as long as a layer's attention
        for holder in (model, model.config, model.config.get_text_config()):
            for name in self.weights:
                weight = holder.__dict__.get(name)
                if isinstance(weight, int | float) and weight != 0:
                    self._switched_off.append((holder, name, weight))
                    setattr(holder, name, 0.0)

    def restore(self, model: PreTrainedModel, args: Any, output: Any) -> None:
        """Restore the weights, and zero the losses for training: a post-hook that also runs after an Exception."""
        self.put_back()
        for name in self.outputs:
            loss = getattr(output, name, None)
            if isinstance(loss, Tensor) and (model.training or self.state.has_begun):
                setattr(output, name, torch.zeros_like(loss))


def switch_off_native_losses(model: nn.Module, settings: SymphonyConfig, state: TrainingState) -> list[NativeLosses]:
    """Register the hooks on every model that computes a loss, the given one or one inside it. Returns all of them."""
    replaced = [names for setting, names in _REPLACED.items() if getattr(settings, setting) > 0]
    attached: list[NativeLosses] = []
    if not replaced:
        return attached
    weights, outputs = ([name for names in column for name in names] for column in zip(*replaced, strict=True))
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        parameters = list(inspect.signature(module.forward).parameters)
        if "labels" in parameters:
            attached.append(NativeLosses(weights, outputs, parameters.index("labels"), state))
            attached[-1].attach(module)
    return attached
