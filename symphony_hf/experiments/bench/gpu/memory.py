"""Estimates of a step's memory, so that the micro-batch size starts near the largest that fits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from symphony_hf.training.planning.optimizers import optimizer_of

from .flops import lora_weights
from .shapes import TOP_K, Inputs, build, image_tokens

OPTIMIZERS = {"AdamW": "adamw_torch", "AdamW8bit": "adamw_bnb_8bit", "Adafactor": "adafactor"}
"""Names in TrainingArguments, by which `symphony plan` knows the optimizers' states."""

USABLE = 0.92
"""Usable share of the free memory. The rest is for fragmentation and workspaces."""

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


def parameter_shapes(config: PreTrainedConfig) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters, without allocating them."""
    return [tuple(p.shape) for p in build(config, torch.device("meta"), torch.bfloat16).parameters()]


def estimate(
    config: PreTrainedConfig,
    shapes: Sequence[tuple[int, ...]],
    mode: str,
    optimizer: str | None,
    dtype: torch.dtype,
    inputs: Inputs,
) -> Estimate:
    """Estimate the memory of a step. Training uses gradient checkpointing.

    `shapes` are those of the model's parameters; `optimizer` is a key of OPTIMIZERS, or None in inference.
    """
    size, text = dtype.itemsize, config.get_text_config()
    adapters = lora_weights(text) if mode == "lora" else 0
    trained: list[tuple[tuple[int, ...], int]] = []
    if mode == "full":
        trained = [(shape, size) for shape in shapes]
    elif mode == "lora":
        trained = [((adapters,), 4)]  # PEFT keeps adapters in float32
    tokens = inputs.micro_batch * (inputs.text_tokens + image_tokens(config))
    return Estimate(
        weights=sum(map(math.prod, shapes)) * size + adapters * 4,
        gradients=sum(math.prod(shape) * element for shape, element in trained),
        optimizer=optimizer_of(OPTIMIZERS[optimizer]).state_bytes(trained) if optimizer else 0.0,
        activations=tokens * _activation_bytes(text, mode, size),
    )


def _activation_bytes(text: PreTrainedConfig, mode: str, size: int) -> float:
    """Estimate the bytes of one token: those of the layer that runs, and what the other layers keep."""
    layer = 10 * text.hidden_size + TOP_K * (5 * text.intermediate_size + 3 * text.hidden_size)
    if mode == "inference":
        cache = 2 * text.num_hidden_layers * text.hidden_size
        return size * (layer + cache)
    kept = text.num_hidden_layers * text.hidden_size  # the input of each layer
    logits = text.vocab_size * (2 * size + 3 * 4)  # logits and gradient; in float32, logits, softmax and gradient
    return size * (2 * layer + kept) + logits


def fitting_micro_batch(needs: Callable[[int], float], limit: int, free_bytes: float | None) -> int:
    """Return the largest micro-batch size that fits, a power of two; 0 if not even one sequence fits.

    `needs` returns the bytes of a step by its micro-batch size. One sequence is tried even if the limit is 0, and
    nothing is too large if the free memory is None.
    """
    sequences = 1 << max(limit, 1).bit_length() - 1
    while sequences > 0 and free_bytes is not None and needs(sequences) > USABLE * free_bytes:
        sequences //= 2
    return sequences
