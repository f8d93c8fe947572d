"""An estimate of a step's memory: what cannot fit is not tried, and what can is tried at a fitting size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .flops import lora_weights
from .shapes import TOP_K, Inputs, build, image_tokens

OPTIMIZER_BYTES = {"AdamW": 8.0, "AdamW8bit": 2.0, "Adafactor": 0.0}
"""Of state, for a trained weight: two moments in float32, in 8 bits, and factored into a row and a column."""

USABLE = 0.92
"""Of the free memory: the rest goes to fragments and workspaces."""

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of a step on one device, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def count_parameters(config: PreTrainedConfig) -> int:
    """All parameters of the model, which is built without storage."""
    return sum(p.numel() for p in build(config, torch.device("meta"), torch.bfloat16).parameters())


def estimate(
    config: PreTrainedConfig, parameters: int, mode: str, optimizer: str | None, dtype: torch.dtype, inputs: Inputs
) -> Estimate:
    """Estimate the memory of a step, with gradient checkpointing where it trains.

    Args:
        config: What `config_of` returns.
        parameters: Of the model.
        mode: One of `flops.MODES`.
        optimizer: A key of OPTIMIZER_BYTES; None in inference.
        dtype: Of the weights.
        inputs: Of the step.
    """
    size, text = dtype.itemsize, config.get_text_config()
    adapters = lora_weights(text) if mode == "lora" else 0
    trained = {"full": parameters, "lora": adapters, "inference": 0}[mode]
    tokens = inputs.micro_batch * (inputs.text_tokens + image_tokens(config))
    return Estimate(
        weights=parameters * size + adapters * 4,  # PEFT keeps adapters in float32
        gradients=trained * (4 if mode == "lora" else size),
        optimizer=trained * OPTIMIZER_BYTES[optimizer] if optimizer else 0.0,
        activations=tokens * _activation_bytes(text, mode, size),
    )


def _activation_bytes(text: PreTrainedConfig, mode: str, size: int) -> float:
    """Of one token: those of the layer under way, and what is kept of the others."""
    layer = 10 * text.hidden_size + TOP_K * (5 * text.intermediate_size + 3 * text.hidden_size)
    if mode == "inference":
        cache = 2 * text.num_hidden_layers * text.hidden_size
        return size * (layer + cache)
    kept = text.num_hidden_layers * text.hidden_size  # each layer's input
    logits = text.vocab_size * (2 * size + 3 * 4)  # them and their gradient; in float32, their softmax and gradient
    return size * (2 * layer + kept) + logits


def fitting_micro_batch(needs: Callable[[int], float], most: int, free_bytes: float | None) -> int:
    """The largest power of two of sequences that fits; 0 where not even one does.

    Args:
        needs: The bytes of a step with so many sequences.
        most: Sequences, whatever would fit; one is tried in any case.
        free_bytes: The device's; None where there is no bound.
    """
    sequences = 1 << max(most, 1).bit_length() - 1
    while sequences > 0 and free_bytes is not None and needs(sequences) > USABLE * free_bytes:
        sequences //= 2
    return sequences
