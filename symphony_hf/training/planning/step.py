"""A training step of a recipe on the meta device, where it has every size and no numbers: its memory and its FLOPs."""

import contextlib
import math
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from symphony_hf.errors import UnsupportedModelError
from symphony_hf.patching.symphonize import is_symphonized, symphony_routers
from symphony_hf.recipe import Recipe
from symphony_hf.training.models import add_adapters, add_graph, choose_trained, empty_model

from .meta_device import MetaStandIns, head_is_tiled, pack_experts, tiled_loss
from .settings import TrainSettings


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


@dataclass(frozen=True)
class StepBytes:
    """What one micro-batch's forward and backward hold beside weights, optimizer and the gradients of earlier ones.

    Attributes:
        activations: What autograd keeps, and what is passing, such as the logits' gradient; at its peak.
        with_gradients: Likewise with the gradients that the backward has finished by then; at its own peak.
    """

    activations: int
    with_gradients: int


def meta_model(recipe: Recipe) -> nn.Module:
    """What a recipe trains, without weights: symphonized, adapted, and with what is trained marked.

    Raises:
        ConfigError: If the model's config is not to be had.
    """
    model = empty_model(recipe)
    add_graph(model, recipe)
    choose_trained(model, recipe.model.trainable)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # PEFT asks by it
        adapted = add_adapters(model, recipe.peft)
    return adapted.to("meta")  # type: ignore[no-any-return]  # PEFT makes adapters where there is memory


class MetaStep:
    """One micro-batch of a recipe, forward and backward, on the meta device.

    Nothing of it is a formula: the model's own code runs, with its experts, its loss and its checkpointing, and each
    tensor is counted while it lives. Sequences are taken to be as long as the recipe allows, and experts to be chosen
    evenly.

    Args:
        recipe: From `load_recipe`.
        settings: Of its train section.
        half: The type of mixed precision; None without it.
        cast_whole: Whether the model is cast to it, as DeepSpeed's engine does; otherwise autocast casts products.
    """

    def __init__(
        self, recipe: Recipe, settings: TrainSettings, half: torch.dtype | None, cast_whole: bool = False
    ) -> None:
        self._recipe = recipe
        self._autocast = None if cast_whole else half
        self._model: Any = meta_model(recipe).train()
        if cast_whole and half is not None:
            self._model.to(half)
        if recipe.model.quantization is not None:
            pack_experts(self._model)
        if settings.checkpointing:
            self._checkpoint_activations()
        self._head_is_tiled = recipe.data.kind == "chat" and head_is_tiled()
        if is_symphonized(self._model):
            for _, router in symphony_routers(self._model):
                assert router.stack is not None
                router.stack.state.scale = torch.zeros((), device="meta")  # as a device with memory gets one

    def bytes(self, micro_batch: int) -> StepBytes:
        """Count a step's memory.

        Args:
            micro_batch: Sequences.

        Raises:
            UnsupportedModelError: If the model's forward depends on numbers.
        """
        batch = self._batch(micro_batch)
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        live = LiveBytes([*self._model.parameters(), *self._model.buffers(), *tensors])
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(live.finish_gradient) for parameter in trained]
        try:
            self._run(batch, live)
        finally:
            for hook in hooks:
                hook.remove()
        return StepBytes(live.peak, live.peak_with_gradients)

    def flops(self) -> int:
        """Count the FLOPs of one sequence: forward, backward, and what checkpointing computes again.

        A product with a weight is 2 FLOPs for a weight and a token, of attention the half that causality leaves.

        Raises:
            UnsupportedModelError: If the model's forward depends on numbers.
        """
        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        self._run(self._batch(1), counter)
        return int(counter.get_total_flops())

    def _run(self, batch: dict[str, Any], watching: contextlib.AbstractContextManager[Any]) -> None:
        try:
            with watching:
                self._loss(batch).backward()
        except (NotImplementedError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(
                f"plan: a step of {type(self._model).__name__} cannot be counted without numbers: {first}"
            ) from error
        finally:
            self._model.zero_grad()

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        with MetaStandIns(self._autocast):
            if self._head_is_tiled:
                model = _bare(self._model)
                hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
                return tiled_loss(hidden, model.get_output_embeddings().weight, self._autocast or hidden.dtype)
            outputs = self._model(**batch, use_cache=False)
            if self._autocast is not None and outputs.get("logits") is not None:
                outputs.logits = outputs.logits.float()  # as accelerate does of all outputs
        return outputs.loss  # type: ignore[no-any-return]

    def _batch(self, rows: int) -> dict[str, Any]:
        ids = torch.empty(rows, self._recipe.data.block_size, dtype=torch.long, device="meta")
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if self._recipe.data.kind == "llava":
            vision = self._model.config.vision_config
            shape = rows, vision.num_channels, vision.image_size, vision.image_size
            batch["pixel_values"] = torch.empty(shape, device="meta")
        return batch

    def _checkpoint_activations(self) -> None:
        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), MetaStandIns(self._autocast)

        model = _bare(self._model)
        # The old name is the oldest transformers' only one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": contexts})


def _bare(model: Any) -> Any:
    """The model below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], dropout: float = 0.0, causal: bool = False, **_: Any
) -> int:
    """Two products of queries by keys by head size."""
    flops = 2 * math.prod(query) * (key[-2] + value[-2])
    return flops // 2 if causal else flops


def _attention_backward_flops(gradient: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Five products for the forward's two: the scores are computed again."""
    query, key, value = args[:3]
    dropout, causal = args[5:7]
    return _attention_flops(query, key, value, dropout, causal) * 5 // 2


def _grouped_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Each row with one expert's weight; or, for the weights' gradients, each column."""
    return 2 * math.prod(left) * right[-1]


def _product_flops(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    """A product that is added to what is there."""
    return 2 * math.prod(left) * right[-1]


_FLOPS = {
    torch.ops.aten.addmm_: _product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}
"""Of the operators that `torch.utils.flop_counter` has no formula for."""
