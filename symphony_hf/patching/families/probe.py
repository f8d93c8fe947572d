"""Run a twin of a router on random numbers, whole or its head alone, and see what it returns."""

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from symphony_hf.errors import UnsupportedModelError

from .substitution import linear_of, stand_in_class, substitute_logits

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
    """Return a tensor's full shape, also where ZeRO-3 has left an empty tensor."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw float32 normal numbers on the CPU, also inside contexts that load checkpoints."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw float32 numbers from 0 to 1 on the CPU, also inside contexts that load checkpoints."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Repeat the same random draws on the CPU at every entry, for routers that sample. Other generators stay."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed accelerators, too
        yield


def random_like(generator: torch.Generator, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """Make CPU tensors of given ones' shapes: matrices that keep a unit variance, vectors far from zero."""

    def make(tensor: Tensor) -> Tensor:
        shape = full_shape(tensor)
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype, device="cpu")
        made_dtype = dtype or (torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype)  # float8: no arithmetic
        if len(shape) < 2:  # zeros or ones would hide where a bias or a scale enters
            return (0.5 + uniform(shape, generator)).to(made_dtype)
        return (normal(shape, generator) / shape[-1] ** 0.5).to(made_dtype)

    return make


def twin(module: nn.Module, make: Callable[[Tensor], Tensor], training: bool = False) -> nn.Module:
    """Copy a module of any class without its hooks. `make` gives a tensor for each parameter and buffer."""
    copied = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        # A forward may write into a list or a dictionary of the module.
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


NUM_TOKENS = 24
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm")  # DeepSpeed replaces `linear` by its own
WRONG_INPUT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError, AssertionError)
"""Errors that a forward raises for unsuitable inputs. Others are bugs of its own, and are not hidden."""


class LinearSpy(TorchFunctionMode):
    """Notes what linear maps with a number of rows return while it is entered.

    Args:
        rows: The number.

    Attributes:
        outputs: In the order of the calls. Shape of each: (..., rows).
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS and output.dim() and output.shape[-1] == self.rows:
            self.outputs.append(output.clone())  # forwards change it in place
        return output


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Return a router's output as a tuple: some return their logits alone."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Probe:
    """One router's twin, its input, and what it returns.

    Args:
        name: The router's module name, for error messages.
        router: The router. It is not changed.
        dtype: Type of the twin's weights. If None, the router's own.
        training: Mode in which it is run.

    Attributes:
        where: The router, for error messages.
        router: Its twin.
        linear: Path of the linear map to the logits in it.
        rows: Number of rows of that map's weight.
        hidden: The input, of the shape that the router takes.
        arguments: What it takes beside, by name.
        outputs: What it returned, as a tuple.
        raw: What the linear map returned. Shape: (tokens, rows).
        calls_linear: Whether the map was called; otherwise its weight was read.
        parameters: Names of the map's parameters that `raw` depends on.
        multiplies_input: Whether `raw` is the input itself times the weight.

    Raises:
        UnsupportedModelError: If there is no linear map in it, or its forward does not run.
    """

    def __init__(self, name: str, router: nn.Module, dtype: torch.dtype | None = None, training: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.where = f"{type(router).__name__} `{name}`"
        self.base_class = type(router)
        self.router = twin(router, random_like(generator, dtype), training)
        self.linear = _linear_path(self.where, router)
        weight: Any = linear_of(self.router, self.linear).weight
        self.rows, inputs = weight.shape
        hidden_size = _hidden_size(self.router, self.linear)
        self.arguments = _arguments_beside(self.base_class, self.rows, generator)
        hidden_TD = normal((NUM_TOKENS, hidden_size), generator).to(weight.dtype)
        problems = []
        for hidden in (hidden_TD, hidden_TD[None]):  # some take only (batch, length, hidden_size)
            try:
                self._run(hidden)
                break
            except WRONG_INPUT as error:
                problems.append(f"{type(error).__name__}: {error}")
        else:
            raise UnsupportedModelError(
                f"{self.where}: its forward did not run on hidden states of shape (tokens, {hidden_size}) or (1, "
                f"tokens, {hidden_size}): {' | '.join(problems)}"
            )
        if not self._products:
            raise UnsupportedModelError(f"{self.where}: its forward does not multiply by its weight")
        if not self.linear and len(self._products) > 1:
            raise UnsupportedModelError(
                f"{self.where}: its forward makes {len(self._products)} products with {self.rows} outputs, of which "
                "its weight is in one"
            )
        self.raw = self._products[-1].reshape(-1, self.rows)
        self.parameters = ("weight", "bias") if self._adds_bias() else ("weight",)
        self.multiplies_input = inputs == hidden_size and torch.equal(
            torch.nn.functional.linear(hidden_TD.float(), weight.float()), self.raw.float()
        )

    def _run(self, hidden: Tensor) -> None:
        calls: list[Any] = []
        handle = linear_of(self.router, self.linear).register_forward_hook(lambda *call: calls.append(call))
        try:
            with same_draws(), LinearSpy(self.rows) as spy:
                outputs = self.base_class.forward(self.router, hidden.clone(), **self.arguments)
        finally:
            handle.remove()
        self.hidden, self.outputs = hidden, as_tuple(outputs)
        self._products = spy.outputs
        self.calls_linear = bool(self.linear and calls)

    def run(self) -> tuple[Any, ...]:
        """Run the router again on the same input, with what its tensors and arguments hold now."""
        with same_draws():
            return as_tuple(self.base_class.forward(self.router, self.hidden.clone(), **self.arguments))

    def _adds_bias(self) -> bool:
        """Whether the map's own `bias` is in its product. Some routers have one of that name that only chooses."""
        bias = linear_of(self.router, self.linear)._parameters.get("bias")
        return bias is not None and not torch.equal(self.run_with(bias, bias + 1)[1], self.raw)

    def run_with(self, tensor: Tensor, value: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """Run the router again on the same input, with other numbers in one of its tensors or arguments.

        Returns:
            What it returned, as `outputs`, and what the linear map did, as `raw`.
        """
        own = tensor.clone()
        tensor.copy_(value)
        with LinearSpy(self.rows) as spy:
            outputs = self.run()
        tensor.copy_(own)
        return outputs, spy.outputs[-1].reshape(-1, self.rows)

    def finish(self, logits: Tensor, hidden: Tensor | None = None) -> tuple[Any, ...]:
        """Run the router's head alone on given logits.

        Args:
            logits: In place of what the linear map returns. Shape: (tokens, rows).
            hidden: What the rest of the router gets; the probe's own when None.
        """
        hidden = self.hidden if hidden is None else hidden
        replaced, inputs = substitute_logits(
            self.router,
            stand_in_class(self.base_class),
            self.linear,
            self.calls_linear,
            logits,
            hidden.clone(),
            self.parameters,
        )
        with same_draws():
            return as_tuple(self.base_class.forward(replaced, inputs, **self.arguments))  # type: ignore[arg-type]


def _linear_path(where: str, router: nn.Module) -> str:
    """Return the path of the linear map to the logits: the router itself, or the last nn.Linear in it."""
    own = router._parameters.get("weight")
    if own is not None:
        if len(full_shape(own)) != 2 or not own.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{where}: its weight is {own.dtype} of shape {full_shape(own)}, not floating-point of shape "
                "(num_experts, hidden_size): keep routers out of the quantization"
            )
        return ""
    linears = [path for path, module in router.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UnsupportedModelError(f"{where}: neither a weight of its own nor an nn.Linear in it")
    return linears[-1]


def _hidden_size(router: nn.Module, path: str) -> int:
    """Return the width of the router's input: that of its weight, or of its first linear map."""
    if not path:
        return router.weight.shape[1]  # type: ignore[union-attr, return-value, index]
    return next(full_shape(m.weight)[1] for m in router.modules() if isinstance(m, nn.Linear))


def _arguments_beside(router_class: type[nn.Module], rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the forward's arguments beside hidden states: some add a bias to their scores to choose."""
    names = list(inspect.signature(router_class.forward).parameters)[2:]
    return {name: uniform((rows,), generator) for name in names if name.endswith("bias")}
