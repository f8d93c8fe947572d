"""What DeepSpeed needs to know before a model is built for it, on machines where it does not find out by itself."""

import torch
import torch.distributed as dist


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
