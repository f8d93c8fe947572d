"""Precision of trained weights: in 16 bits, small steps of an optimizer are rounded away."""

import warnings
from typing import Any

import torch
from torch import nn

from symphony_hf.errors import SymphonyWarning

REMEDY = "set `model.dtype: float32` with `bf16: true`, or launch with ZeRO, which keeps a float32 copy"


def keep_steps_precise(trainer: Any, strategy: str) -> None:
    """Train whole modules of adapters in float32, and warn about other weights that are trained in 16 bits.

    bfloat16 rounds away a step below 1/512 of a weight, which is most of AdamW's at learning rates of 1e-5. DeepSpeed,
    and FSDP in mixed precision, keep float32 copies of the weights for the optimizer.

    Args:
        trainer: Trainer, before its training.
        strategy: Its strategy, of `launch.strategy_of`.
    """
    is_mixed = trainer.accelerator.mixed_precision in ("bf16", "fp16")
    if strategy.startswith("zero") or (strategy == "fsdp" and is_mixed):
        return
    if is_mixed and strategy != "fsdp":
        for name, parameter in narrow_weights(trainer.model).items():
            if is_saved_whole(name):
                parameter.data = parameter.data.float()
    narrow = narrow_weights(trainer.model)
    if narrow and trainer.is_world_process_zero():
        warnings.warn(
            f"train: {len(narrow)} trained weights ({next(iter(narrow))}, ...) are in 16 bits, and the optimizer keeps "
            f"no float32 copy of them, so that small steps are rounded away (learning_rate "
            f"{trainer.args.learning_rate:g}): {REMEDY}",
            SymphonyWarning,
            stacklevel=2,
        )


def narrow_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters in 16 bits, by name; not LoRA's, which begin near 0, where steps are not lost."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16) and ".lora_" not in name
    }


def is_saved_whole(name: str) -> bool:
    """Whether a parameter is in a module that an adapter holds whole, such as a trained router.

    Outside of mixed precision, its forward needs the dtype of the other weights.
    """
    return ".modules_to_save." in name
