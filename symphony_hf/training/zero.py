"""Preparations for DeepSpeed before a model is built, and work on partitioned parameters."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def prepare_deepspeed(device: torch.device) -> None:
    """Initialize DeepSpeed with the existing process group, and without its shared-memory kernel on a CPU.

    Under ZeRO-3 a model is partitioned while it is built, so the process group must exist by then. On a CPU, DeepSpeed
    would first spend minutes on compiling an all-reduce through shared memory; gloo's works too.
    """
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend())


@contextlib.contextmanager
def gathered(parameters: list[Any]) -> Iterator[None]:
    """Gather parameters on every process if ZeRO-3 partitioned them. Other tensors are left as they are."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def gather_when_saving(plugin: Any) -> None:
    """Make ZeRO-3 save whole weights: without this setting it saves shards that nothing else loads."""
    plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def set_aside_empty_parameters(model: nn.Module) -> int:
    """Replace parameters without elements by buffers, since ZeRO-3 fails to gather them. Returns their number.

    An upcycled Phi-3 has such parameters: Qwen2-MoE, its container, has a shared expert of size 0. As buffers they keep
    their names in a checkpoint.
    """
    count = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # a partitioned parameter is empty itself
            if 0 in shape:
                delattr(module, name)
                module.register_buffer(name, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
                count += 1
    return count
