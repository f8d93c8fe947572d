"""Whether the rows of a cache are still those of the forward before: beam search reorders them."""

import weakref
from typing import Any

import torch
from torch import Tensor


class CacheRows:
    """Keys of one layer as the last forward left them, which are compared where something has replaced them since."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._noted: weakref.ref[Tensor] | None = None  # the cache's own tensor, to tell whether it was replaced

    def note(self, cache: Any) -> None:
        """Note a cache after a forward; None where there is none."""
        keys = _last_keys(cache)
        self._keys = None if keys is None else keys.detach()  # not with the graph of a forward behind it
        self._noted = None if keys is None else weakref.ref(keys)

    def are_kept(self, cache: Any) -> bool:
        """Whether each row of a cache holds the tokens of that row after the last forward.

        Tokens may have been removed at the end, as assisted decoding does. A cache of another number of rows, or of an
        unknown kind, is taken as it is.
        """
        before, keys = self._keys, _last_keys(cache)
        if before is None or keys is None or len(keys) != len(before):
            return True
        if self._noted is not None and self._noted() is keys:
            return True
        length = min(keys.shape[-2], before.shape[-2])
        return torch.equal(keys[..., :length, :], before[..., :length, :].to(keys.device))

    def clear(self) -> None:
        """Let go of the keys."""
        self._keys = self._noted = None


def cache_in(arguments: dict[str, Any]) -> Any:
    """Return the cache among a forward's arguments, whatever this version of the model calls it; None without one."""
    return next((value for value in arguments.values() if hasattr(value, "get_seq_length")), None)


def _last_keys(cache: Any) -> Tensor | None:
    """Return the keys of the last layer that has any, which depend on all tokens before.

    Shape: (rows, heads, tokens, head size).
    """
    every = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", None) or ()]
    return next((keys for keys in reversed(every) if isinstance(keys, Tensor) and keys.dim() == 4), None)
