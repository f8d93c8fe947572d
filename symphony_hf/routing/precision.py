"""Routing in full precision, also inside an autocast region."""

import contextlib

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """A region that autocast leaves alone, on the tensor's device: bf16 would round counts over 256, and the graph."""
    if tensor.is_meta:  # autocast knows no such device
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)  # type: ignore[return-value]
