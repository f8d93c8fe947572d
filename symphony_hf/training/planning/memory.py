"""Memory of a GPU and of a host by part, under each way to distribute training over GPUs."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from symphony_hf.conversion.inspection.parts import Anatomy, Part
from symphony_hf.conversion.inspection.tensors import held_tensors

from .launches import Launch
from .meta_device import packed_bytes, packed_names
from .optimizers import Optimizer, Weight
from .step import StepBytes

_BUCKET = 500_000_000
"""Elements in DeepSpeed's buffer for gradient reduction: the default of its `reduce_bucket_size`."""

_LIVE = 1_000_000_000
"""Maximum number of weights that ZeRO-3 keeps gathered: the default of its `stage3_max_live_parameters`."""

_HOST_ALLOWANCE = 0.5
"""Share added for buffers to what is offloaded: DeepSpeed's own estimate is 1.5 times the states."""


@dataclass(frozen=True)
class States:
    """Sizes of a model's weights, gradients and graphs.

    Attributes:
        weights: Bytes of the weights and other buffers, in the recipe's dtype, or packed if it quantizes them.
        weights_in_half: The same with everything that is not packed in 16 bits, as DeepSpeed keeps it.
        total: Number of weights.
        largest: Number of weights of the largest single module, without its submodules.
        trained: Shape and element size of each trained weight.
        graph: Bytes of the graphs, which are float32 and replicated on every process.
    """

    weights: int
    weights_in_half: int
    total: int
    largest: int
    trained: tuple[Weight, ...]
    graph: int

    @property
    def num_trained(self) -> int:
        return sum(math.prod(weight.shape) for weight in self.trained)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, each in the dtype of its weight."""
        return sum(math.prod(weight.shape) * weight.size for weight in self.trained)


def states_of(model: nn.Module, quantized: bool) -> States:
    """Measure a model, which may be on the meta device, with its trained parameters marked.

    `quantized` tells whether its frozen experts and linear layers will be packed in 4 bits.
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
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return States(
        weights=weights,
        weights_in_half=in_half,
        total=sum(parameter.numel() for parameter in parameters),
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        trained=tuple(
            Weight(tuple(p.shape), p.element_size(), id(p) in embeddings) for p in parameters if p.requires_grad
        ),
        graph=graph,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    Attributes:
        gpu: Bytes on one GPU by part; empty if training runs on the CPU.
        host: Bytes on one machine by part, during training.
        loading: Bytes on one machine while the model is loaded: each of its processes reads the whole model.
    """

    gpu: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    loading: int = 0

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        """Peak bytes on one machine: loading ends before training begins."""
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
    """Distribute a model's states and a step's tensors over devices.

    Args:
        launch: Launch to plan for.
        processes: Number of processes on all machines, with one GPU each.
        states: Sizes of the model.
        step: Bytes of one micro-batch, in the precision of the launch.
        optimizer: The recipe's optimizer.
        half: Dtype of mixed precision; None for full precision.
        accumulates: Whether an optimizer step has several micro-batches, of which the later ones run with all gradients
            allocated.

    Returns:
        Memory by part: `weights`, `gradients`, `optimizer` (with the float32 weights that DeepSpeed updates),
        `activations`, `graph`, and `buffers` (gradients in reduction, weights gathered by ZeRO-3, and the part of the
        optimizer step's temporaries that does not fit in the memory the activations have freed).
    """
    local = processes // launch.machines
    if launch.uses_deepspeed:
        memory = _with_deepspeed(launch, processes, local, states, step, optimizer, half)
    else:
        memory = Memory(_on_each(processes, states, step, optimizer, accumulates, launch.on_gpu))
    host = memory.host
    if not launch.on_gpu:  # what would be on the GPUs is there, too, once for each process
        host = {part: host.get(part, 0) + local * size for part, size in memory.gpu.items()}
    return Memory(memory.gpu if launch.on_gpu else {}, host, local * states.weights)


def _on_each(
    processes: int, states: States, step: StepBytes, optimizer: Optimizer, accumulates: bool, on_gpu: bool
) -> dict[str, int]:
    """Return the bytes of one process by part without DeepSpeed: each has the whole model."""
    # Gradients are a part of their own. From the second micro-batch on, all of them exist.
    activations = step.activations if accumulates else step.with_gradients - states.gradients
    exchanged = states.gradients if processes > 1 else 0  # DistributedDataParallel holds them a second time, in buckets
    return {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": optimizer.state_bytes(states.trained),
        "activations": activations,
        "graph": states.graph,
        "buffers": exchanged + max(0, optimizer.temporary_bytes(states.trained, on_gpu) - activations),
    }


def _with_deepspeed(
    launch: Launch,
    processes: int,
    local: int,
    states: States,
    step: StepBytes,
    optimizer: Optimizer,
    half: torch.dtype | None,
) -> Memory:
    """Memory under DeepSpeed's ZeRO, whose stage says what is partitioned over the processes.

    Source: DeepSpeed's `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`, for Adam in
    mixed precision: 2 bytes for a weight; 2 (ZeRO-2) and 4 for its gradient in 16 bits and in 32; 4 for its float32
    copy; 8 for the moments. Deviation: frozen weights need only the first; optimizer states are those of the recipe's
    optimizer; gathered weights are counted up to ZeRO-3's limit, not by the largest layer.
    """
    size = 4 if half is None else 2
    trained = states.num_trained
    weights = states.weights if half is None else states.weights_in_half
    flat = [Weight((trained,), 4)]  # DeepSpeed flattens the weights into one vector
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
    return Memory(_whole(gpu), _whole(host))


def _whole(parts: dict[str, Any]) -> dict[str, int]:
    return {name: math.ceil(value) for name, value in parts.items()}
