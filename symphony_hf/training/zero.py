"""What DeepSpeed needs to know before a model is built for it, on machines where it does not find out by itself."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def prepare_deepspeed(device: torch.device) -> None:
    """Have DeepSpeed use the processes that met already, and build no kernel for talk between them on a CPU.

    A model that is built under ZeRO-3 is partitioned over the processes while it is built, so they must be known then.
    On a CPU, DeepSpeed would compile an all-reduce through shared memory first, for minutes; gloo does.
    """
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend())


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Have parameters whole on every process, where ZeRO-3 partitioned them when the model was built."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def gather_when_saving(plugin: Any) -> None:
    """Have ZeRO-3 save whole weights: without this setting a saved model is pieces that nothing else loads."""
    plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def set_aside_empty_parameters(model: nn.Module) -> int:
    """Make parameters without elements buffers: DeepSpeed's ZeRO-3 fails when it gathers one.

    An upcycled Phi-3 has them: its container, Qwen2-MoE, has a shared expert, of size 0. As buffers they keep their
    names in a checkpoint.

    Returns:
        How many there were.
    """
    count = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # partitioned, it has another of its own
            if 0 in shape:
                delattr(module, name)
                module.register_buffer(name, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
                count += 1
    return count
