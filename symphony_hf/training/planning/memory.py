"""Where a model's states and a step's tensors are, under each way to spread a training over GPUs."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from symphony_hf.conversion.inspection.parts import Anatomy, Part
from symphony_hf.conversion.inspection.tensors import held_tensors

from .launches import Launch
from .meta_device import packed_bytes, packed_names
from .optimizers import Optimizer
from .step import StepBytes

_BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer of gradients to be reduced: its `reduce_bucket_size`, which recipes leave as it is."""

_LIVE = 1_000_000_000
"""Weights that ZeRO-3 holds whole at a time, at most: its `stage3_max_live_parameters`, likewise."""

_HOST_ALLOWANCE = 0.5
"""Of what is offloaded, for buffers: DeepSpeed's own estimate takes 1.5 times the states for the host."""


@dataclass(frozen=True)
class States:
    """The sizes of a model, whatever they are multiplied with.

    Attributes:
        weights: Bytes of the weights and other buffers as the recipe has them: packed, where it packs them.
        weights_in_half: Likewise with all that is not packed in 16 bits, as DeepSpeed has them.
        total: Number of weights.
        largest: Of the module that has the most of its own.
        trained: (shape, bytes of one number) of each trained weight.
        graph: Bytes of the graphs, which are whole everywhere, and float32.
    """

    weights: int
    weights_in_half: int
    total: int
    largest: int
    trained: tuple[tuple[tuple[int, ...], int], ...]
    graph: int

    @property
    def num_trained(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.trained)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, each of its weight's type."""
        return sum(math.prod(shape) * size for shape, size in self.trained)


def states_of(model: nn.Module, quantized: bool) -> States:
    """Measure a model, which may be on the meta device.

    Args:
        model: Ready to train.
        quantized: Whether its frozen experts and linear maps will be packed in 4 bits.
    """
    anatomy, packed = Anatomy(model), packed_names(model) if quantized else set()
    weights = in_half = graph = 0
    for held in held_tensors(model):
        if anatomy.part_of(held) is Part.GRAPHS:
            graph += held.tensor.nbytes
        elif held.name in packed and not held.tensor.requires_grad:
            weights, in_half = weights + packed_bytes(held.numel), in_half + packed_bytes(held.numel)
        else:
            weights, in_half = weights + held.tensor.nbytes, in_half + 2 * held.numel
    parameters = list(model.parameters())
    return States(
        weights=weights,
        weights_in_half=in_half,
        total=sum(parameter.numel() for parameter in parameters),
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        trained=tuple((tuple(p.shape), p.element_size()) for p in parameters if p.requires_grad),
        graph=graph,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    Attributes:
        gpu: Of one GPU; empty where none trains.
        host: Of one machine, while it trains.
        loading: Of one machine, before: each of its processes reads the whole model.
    """

    gpu: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    loading: int = 0

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        """The most at a time: what is loaded goes to the GPUs, or is what trains."""
        return max(sum(self.host.values()), self.loading)


def memory_of(
    launch: Launch,
    processes: int,
    states: States,
    step: StepBytes,
    optimizer: Optimizer,
    half: torch.dtype | None,
    accumulates: bool,
) -> Memory:
    """Spread states and a step over devices.

    Args:
        launch: How.
        processes: On all machines together; one GPU each.
        states: Of the model.
        step: Of one micro-batch, computed as the launch does.
        optimizer: Of the recipe.
        half: The type of mixed precision; None without it.
        accumulates: Whether an optimizer step has several micro-batches: the later ones find all gradients there.

    Returns:
        The parts are `weights`, `gradients`, `optimizer` (with the float32 weights that DeepSpeed updates),
        `activations`, `graph` and `buffers`: gradients on their way to other GPUs, weights that ZeRO-3 has gathered,
        and, where it is more than the activations, what the optimizer's step makes in passing.
    """
    local = processes // launch.machines
    if launch.uses_deepspeed:
        return _with_deepspeed(launch, processes, local, states, step, optimizer, half)
    # What the backward has at once; the gradients are a part of their own, and whole from the second micro-batch on.
    activations = step.activations if accumulates else step.with_gradients - states.gradients
    exchanged = states.gradients if processes > 1 else 0  # DistributedDataParallel has them a second time, in buckets
    parts = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": optimizer.state_bytes(states.trained),
        "activations": activations,
        "graph": states.graph,
        "buffers": exchanged + max(0, optimizer.passing_bytes(states.trained) - activations),
    }
    if not launch.on_gpu:
        return Memory(host=parts)
    return Memory(gpu=parts, loading=local * states.weights)


def _with_deepspeed(
    launch: Launch,
    processes: int,
    local: int,
    states: States,
    step: StepBytes,
    optimizer: Optimizer,
    half: torch.dtype | None,
) -> Memory:
    """ZeRO: what its stage says is cut into as many pieces as there are processes.

    Source: DeepSpeed's `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`, for Adam in
    mixed precision: 2 bytes for a weight; 2 (ZeRO-2) and 4 for its gradient in 16 bits and in 32; 4 for its float32
    copy; 8 for the moments. Deviation: frozen weights have the first alone; the optimizer's bytes are the recipe's;
    gathered weights are counted up to what ZeRO-3 may hold, not by the largest layer.
    """
    size = 4 if half is None else 2
    trained = states.num_trained
    weights = states.weights if half is None else states.weights_in_half
    flat = [((trained,), 4)]  # DeepSpeed gives the optimizer one vector
    in_half = {"zero1": size * trained, "zero2": size * trained / processes, "zero3": 0}[launch.strategy]
    sharded = {
        "gradients": 4 * trained / processes,
        "optimizer": (4 * trained + optimizer.state_bytes(flat)) / processes,
    }
    gpu: dict[str, Any] = {"weights": weights, "gradients": in_half, "optimizer": 0}
    host: dict[str, Any] = {}
    if launch.strategy == "zero3":
        gpu["weights"] = weights / processes
    if launch.weights_on_host:
        host["weights"], gpu["weights"] = local * weights / processes, 0
    if launch.optimizer_on_host:
        gpu["gradients"] = 0
        host |= {name: local * value for name, value in sharded.items()}
    else:
        gpu["gradients"] += sharded["gradients"]
        gpu["optimizer"] += sharded["optimizer"]
    if host:
        host["buffers"] = _HOST_ALLOWANCE * sum(host.values())
    gathered = min(states.total, max(_LIVE, states.largest)) if launch.strategy == "zero3" else 0
    gpu |= {"activations": step.activations, "graph": states.graph, "buffers": size * (_BUCKET + gathered)}
    return Memory(_whole(gpu), _whole(host), local * states.weights)


def _whole(parts: dict[str, Any]) -> dict[str, int]:
    return {name: math.ceil(value) for name, value in parts.items()}
