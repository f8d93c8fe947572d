"""Memory and FLOPs of a recipe's training step, measured on the meta device."""

import contextlib
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import LabelSmoother

from symphony_hf.conversion.inspection.tensors import base_of
from symphony_hf.errors import UnsupportedModelError
from symphony_hf.patching.symphonize import is_symphonized, symphony_routers
from symphony_hf.recipe import Recipe
from symphony_hf.training.models import add_adapters, add_graph, choose_trained, empty_model

from .meta_device import MetaStandIns, head_is_tiled, pack_experts, tiled_loss
from .settings import TrainSettings


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of the storages created in it while they are alive, each once.

    It counts what an allocator would be asked for, in forward, backward and recomputation alike, on the meta device
    too, where storages have a size and no memory. Workspaces inside a kernel are not seen.

    Args:
        outside: Tensors that exist before. Neither they nor views of them are counted.

    Attributes:
        current: Bytes alive now, without finished gradients.
        gradients: Bytes of finished gradients, see `finish_gradient`.
        peak: Maximum of `current`.
        peak_with_gradients: Maximum of `current` and `gradients` together.
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
        """Count a parameter's accumulated gradient as a gradient. For `register_post_accumulate_grad_hook`."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key not in self._finished and self._sizes.get(key):
            self._finished.add(key)
            self.current -= self._sizes[key]
            self.gradients += self._sizes[key]

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch returns the same object for a storage as long as it lives
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
    """Peak bytes of one micro-batch's forward and backward, without weights and optimizer states.

    `activations` is the peak of saved activations and temporaries, such as the gradient of the logits; `with_gradients`
    that of the same together with the gradients that are finished by then.
    """

    activations: int
    with_gradients: int


def meta_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's model on the meta device: symphonized, with adapters, and its trained parameters marked.

    Raises:
        ConfigError: If the model's config could not be loaded.
    """
    model = empty_model(recipe)
    add_graph(model, recipe)
    choose_trained(model, recipe.model.trainable)
    # PEFT creates adapters on a real device.
    return add_adapters(model, recipe.peft).to("meta")  # type: ignore[no-any-return]


class MetaStep:
    """Forward and backward of one micro-batch of a recipe, on the meta device.

    No formula is involved: the model's own code runs, with its experts, loss and checkpointing, and each tensor is
    counted while it is alive. Sequences have the recipe's maximum length, and experts are chosen evenly. A model whose
    forward depends on the values of tensors raises UnsupportedModelError.

    Args:
        recipe: Recipe, from `load_recipe`.
        settings: The recipe's training settings.
        half: Dtype of mixed precision; None for full precision.
        cast_whole: Whether the model itself is cast to `half`, as DeepSpeed's engine does, instead of using autocast.
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
            self._checkpoint_activations(settings.every_n_layers)
        self._smoother = LabelSmoother(settings.label_smoothing) if settings.label_smoothing else None
        self._head_is_tiled = recipe.data.kind == "chat" and self._smoother is None and head_is_tiled()
        if is_symphonized(self._model):
            for _, router in symphony_routers(self._model):
                assert router.stack is not None
                router.stack.state.scale = torch.zeros((), device="meta")  # created only on real devices otherwise

    def bytes(self, micro_batch: int) -> StepBytes:
        """Measure the memory of a step.

        Args:
            micro_batch: Number of sequences.

        Raises:
            UnsupportedModelError: If the model's forward depends on the values of tensors.
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
        """Count the FLOPs of one sequence: forward, backward and recomputation.

        A product with a weight is 2 FLOPs per weight and token. Causal attention counts as half of full attention.

        Raises:
            UnsupportedModelError: If the model's forward depends on the values of tensors.
        """
        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        self._run(self._batch(1), counter)
        return int(counter.get_total_flops())

    def _run(self, batch: dict[str, Any], watching: contextlib.AbstractContextManager[Any]) -> None:
        try:
            with watching:
                self._loss(batch).backward()
        except (RuntimeError, ImportError, ValueError) as error:  # experts with kernels for a GPU raise the last two
            first = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(
                f"plan: a step of {type(self._model).__name__} cannot be measured on the meta device: {first}"
            ) from error
        finally:
            self._model.zero_grad()

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        with MetaStandIns(self._autocast):
            if self._head_is_tiled:
                model = base_of(self._model)
                hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
                return tiled_loss(hidden, model.get_output_embeddings().weight, self._autocast or hidden.dtype)
            labels = None if self._smoother is not None else batch["labels"]
            outputs = self._model(**{**batch, "labels": labels}, use_cache=False)
            if self._autocast is not None and outputs.get("logits") is not None:
                outputs.logits = outputs.logits.float()  # as accelerate does with all outputs
            if self._smoother is not None:
                return self._smoother(outputs, batch["labels"], shift_labels=True)
        return outputs.loss  # type: ignore[no-any-return]

    def _batch(self, rows: int) -> dict[str, Any]:
        ids = torch.empty(rows, self._recipe.data.block_size, dtype=torch.long, device="meta")
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if self._recipe.data.kind == "llava":
            vision = self._model.config.vision_config
            shape = rows, vision.num_channels, vision.image_size, vision.image_size
            batch["pixel_values"] = torch.empty(shape, device="meta")
        return batch

    def _checkpoint_activations(self, every_n_layers: int) -> None:
        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), MetaStandIns(self._autocast)

        model = base_of(self._model)
        # The oldest supported transformers has only the old name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        more = {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}  # which older ones do not know
        enable({"use_reentrant": False, "context_fn": contexts}, **more)


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], dropout: float = 0.0, causal: bool = False, **_: Any
) -> int:
    """Count two products of size queries x keys x head size."""
    flops = 2 * math.prod(query) * (key[-2] + value[-2])
    return flops // 2 if causal else flops


def _attention_backward_flops(gradient: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Count five products for the two of the forward: scores are recomputed."""
    query, key, value = args[:3]
    dropout, causal = args[5:7]
    return _attention_flops(query, key, value, dropout, causal) * 5 // 2


def _grouped_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Count each row with the weight of one expert; for gradients of weights, each column."""
    return 2 * math.prod(left) * right[-1]


def _product_flops(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    """Count a product that is accumulated in place."""
    return 2 * math.prod(left) * right[-1]


_FLOPS = {
    torch.ops.aten.addmm_: _product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}
"""Formulas of operators that `torch.utils.flop_counter` does not know."""
