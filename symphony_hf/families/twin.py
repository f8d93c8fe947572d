"""Copies of modules with random numbers for weights, to look at what a class computes without touching the model.

The model's own weights are not needed: they may be on the meta device while a checkpoint is loading, offloaded, or
partitioned by ZeRO-3.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape, also where ZeRO-3 has partitioned it into an empty one."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Float32 numbers on the CPU, also inside the contexts in which checkpoints are loaded."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Likewise, from 0 to 1."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """The same random draws on the CPU at every entry: some routers sample their choices. Nobody else's change."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators, too
        yield


def random_like(generator: torch.Generator, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """Make CPU tensors of given ones' shapes: matrices that keep a unit variance, vectors far from zero.

    Args:
        generator: Of the random numbers.
        dtype: Of the floating-point ones; that of the given ones when None.
    """

    def make(tensor: Tensor) -> Tensor:
        shape = full_shape(tensor)
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype, device="cpu")
        made_dtype = dtype or (torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype)  # float8: no arithmetic
        if len(shape) < 2:  # a bias or a scale of zeros or ones would not show where it enters
            return (0.5 + uniform(shape, generator)).to(made_dtype)
        return (normal(shape, generator) / shape[-1] ** 0.5).to(made_dtype)

    return make


def twin(module: nn.Module, make: Callable[[Tensor], Tensor], training: bool = False) -> nn.Module:
    """A copy of a module without its hooks.

    Args:
        module: Of any class; it is left as it is.
        make: Gives a tensor for each parameter and buffer.
        training: The copy's mode.
    """
    copied = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        # A forward may note things in a list or a dictionary of its own.
        copied.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    for name in ("forward", "_old_forward", "_hf_hook"):  # of accelerate
        copied.__dict__.pop(name, None)
    for name in _HOOKS:
        copied.__dict__[name] = OrderedDict()
    copied.__dict__["training"] = training
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(module, kind).items()
        copied.__dict__[kind] = {name: None if tensor is None else make(tensor) for name, tensor in tensors}
    copied.__dict__["_modules"] = {
        name: None if child is None else twin(child, make, training) for name, child in module._modules.items()
    }
    return copied
