"""The bytes that tensors hold at any moment, counted as operators make and drop them, also where there are no bytes."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made while it is entered, each once, until nothing refers to it any more.

    It counts what an allocator would be asked for, in forward, backward and recomputation alike; of meta tensors, whose
    storages have a size and no memory, too. What a kernel allocates inside and frees again is not seen.

    Args:
        outside: Tensors that are there before: neither they nor views of them are counted.

    Attributes:
        current: Bytes held now, without gradients.
        gradients: Bytes of gradients that are finished, see `finish_gradient`.
        peak: The most that `current` was.
        peak_with_gradients: The most that both together were.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self._outside = [tensor.untyped_storage() for tensor in outside]
        self._sizes = {id(storage): 0 for storage in self._outside}
        self._finished: set[int] = set()
        self.current = self.gradients = self.peak = self.peak_with_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def finish_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient, which is there to stay, as one. For `register_post_accumulate_grad_hook`."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key not in self._finished and self._sizes.get(key):
            self._finished.add(key)
            self.current -= self._sizes[key]
            self.gradients += self._sizes[key]

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps the same object for a storage as long as that lives
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._drop, key).atexit = False
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        self.peak_with_gradients = max(self.peak_with_gradients, self.current + self.gradients)

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._finished:
            self._finished.remove(key)
            self.gradients -= size
        else:
            self.current -= size
