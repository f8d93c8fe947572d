"""Checks that the tensors of an adapter are in memory as a whole, where numbers can be copied into them."""

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn

from symphony_hf.conversion.inspection.tensors import bare_name, base_of
from symphony_hf.errors import PatchError

_OTHERWISE = "to run it otherwise, save that model after `merge_and_unload()`"


def check_not_sharded(model: nn.Module) -> None:
    """Refuse a model under tensor parallelism.

    Raises:
        PatchError: If it is.
    """
    size = getattr(base_of(model), "tp_size", None) or 1
    if size > 1:
        raise PatchError(
            f"an adapter cannot be loaded into a model that tensor parallelism shards over {size} processes, since PEFT"
            f" gives copies of its tensors: load it onto the whole model; {_OTHERWISE}"
        )


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse an adapter before it is added: PEFT makes its tensors beside those of the model, and like them.

    Args:
        model: Symphonized model, with or without other adapters.
        names: Names of the tensors in the adapter's file.

    Raises:
        PatchError: If one would be made of weights that are sharded or offloaded.
    """
    inside = defaultdict[str, list[tuple[str, Tensor]]](list)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        module, _, leaf = bare_name(name).rpartition(".")
        inside[module].append((leaf, tensor))

    def is_lost(name: str) -> bool:
        module, _, leaf = bare_name(name).rpartition(".")
        copied = [tensor for own, tensor in inside.get(module, ()) if own == leaf]
        if copied:  # the adapter holds the module whole
            return any(tensor.is_meta or _storage(tensor) is None for tensor in copied)
        while module and module not in inside:
            module = module.rpartition(".")[0]
        return any(tensor.is_meta for _, tensor in inside.get(module, ()))

    _refuse([name for name in names if is_lost(name)])


def check_own(tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Refuse tensors that are not the model's own: copies, as of sharded models, or empty, as of offloaded weights.

    Args:
        tensors: Tensors of an adapter, by their names in its file.
        model: The model that has the adapter.

    Raises:
        PatchError: If there are any.
    """
    held = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())} - {None}
    _refuse([name for name, tensor in tensors.items() if tensor.is_meta or _storage(tensor) not in held])


def _refuse(lost: list[str]) -> None:
    if lost:
        raise PatchError(
            f"{len(lost)} tensors of the adapter ({lost[0]}, ...) would be lost, since the model is sharded or "
            f"offloaded: load it onto the whole model; {_OTHERWISE}"
        )


def _storage(tensor: Tensor) -> int | None:
    """Return the address of a tensor's numbers; None for subclasses that wrap other tensors, such as DTensor."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # no attribute tells them from subclasses that have a storage
        return None
