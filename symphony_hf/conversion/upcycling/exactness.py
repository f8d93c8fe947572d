"""Check that the upcycled checkpoint computes what the dense one does, with one layer in memory at a time.

transformers' own classes run in float32 on weights read from the files of both checkpoints, which are in memory only
while their layer runs. Layers of equal shapes are read into the same memory, since fresh memory costs more time than
reading. Experts are compared bit by bit, and one copy is used for all of them, so that a MoE layer needs no more memory
than a dense one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_hf.errors import UpcycleError

from .checkpoint import TORCH_DTYPES, Checkpoint, Rows, same_bytes
from .families import DOWN, GATE, UP, Container
from .plan import ExpertPart
from .source import DenseModel, meta_model

TOLERANCE = 1e-5
"""Tolerance, relative to the largest logit if above 1. Float32 rounds the weighted sum of experts by about 1e-7."""

TOKENS = 64

Allocate = Callable[[int], Tensor]
"""Function of a number of values that returns a float32 tensor to fill with them. Shape: (values,)."""

Reader = Callable[[str, Allocate], Tensor]


@dataclass(frozen=True)
class Exactness:
    """Result of the check: the largest difference of two logits, the largest dense logit, and the number of tokens."""

    difference: float
    largest: float
    tokens: int

    @property
    def tolerance(self) -> float:
        """Largest difference that counts as rounding."""
        return TOLERANCE * max(1.0, self.largest)


@dataclass(frozen=True)
class Upcycled:
    """Upcycled checkpoint as it was written, with the rows of each projection of each expert."""

    checkpoint: Checkpoint
    config: PreTrainedConfig
    container: Container
    experts: dict[ExpertPart, Rows]
    num_experts: int

    def read(self, name: str, allocate: Allocate) -> Tensor:
        """Return a parameter of the stock class by its name in memory; experts share one copy.

        Raises:
            UpcycleError: If two experts differ.
        """
        prefix, _, kind = name.rpartition(".experts.")
        if not prefix:
            stored = name.replace(self.container.router_in_memory, self.container.router)
            return _read(self.checkpoint, stored, allocate)
        layer = int(name.split(".")[2])
        parts = {"gate_up_proj": (GATE, UP), "down_proj": (DOWN,)}[kind]
        first = _floats(self.checkpoint, [self.experts[ExpertPart(layer, 0, part)] for part in parts], allocate)
        for part in parts:
            self._check_copies(layer, part)
        return first.expand(self.num_experts, *first.shape)

    def _check_copies(self, layer: int, part: str) -> None:
        first = self.experts[ExpertPart(layer, 0, part)]
        for expert in range(1, self.num_experts):
            if not same_bytes(self.checkpoint, first, self.experts[ExpertPart(layer, expert, part)]):
                raise UpcycleError(f"upcycle: layer {layer}: `{part}` of expert {expert} is not that of expert 0")


def check_exactness(dense: DenseModel, upcycled: Upcycled, dtype: str | None) -> Exactness:
    """Compare the logits of a dense checkpoint and of its upcycled checkpoint, which has no noise on its experts.

    `dtype` is the type that the weights were cast to, by its name in the safetensors format; the dense weights are cast
    too.

    Raises:
        UpcycleError: If the logits differ by more than rounding, or the dense ones are not finite.
    """
    config, checkpoint = dense.config, dense.checkpoint
    tokens = min(TOKENS, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    expected = _logits(config, partial(_read, checkpoint, dtype=dtype), ids, "checking, dense")
    found = _logits(upcycled.config, upcycled.read, ids, "checking, upcycled")
    if not expected.isfinite().all():
        raise UpcycleError(
            f"upcycle: the dense model of `{checkpoint.folder}` computes logits that are not finite, so nothing can be "
            "checked; `check=False` upcycles it unchecked"
        )
    result = Exactness((found - expected).abs().max().item(), expected.abs().max().item(), tokens)
    if not result.difference <= result.tolerance:
        raise UpcycleError(
            f"upcycle: the upcycled model's logits differ from the dense model's by {result.difference:.3g}, more than "
            f"{result.tolerance:.3g}: nothing was kept. Please report this with the dense checkpoint's config.json"
        )
    return result


def _logits(config: PreTrainedConfig, read: Reader, ids: Tensor, description: str) -> Tensor:
    model = meta_model(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies are computed, not stored
    parts, memory = list(_parts(model)), _Memory()
    with tqdm(total=len(parts), desc=description, unit=" layers", disable=None) as progress, torch.no_grad():
        for name, module in parts:
            module.register_forward_pre_hook(partial(_load, name=name, read=read, memory=memory))
            module.register_forward_hook(partial(_release, memory=memory, progress=progress))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    memory.keep([])  # the model, which the hooks keep it with, may be freed much later
    return logits


class _Memory:
    """Tensors of the module that runs, which the next module fills anew where it has tensors of the same size."""

    def __init__(self) -> None:
        self._used: list[Tensor] = []
        self._free: list[Tensor] = []

    def keep(self, sizes: Iterable[int]) -> None:
        """Drop free tensors, except those of these numbers of values."""
        wanted = Counter(sizes)
        kept: list[Tensor] = []
        for tensor in self._free:
            if wanted[tensor.numel()]:
                wanted[tensor.numel()] -= 1
                kept.append(tensor)
        self._free = kept

    def allocate(self, size: int) -> Tensor:
        """Return a float32 tensor with arbitrary values, a free one if possible. Shape: (size,)."""
        place = next((place for place, tensor in enumerate(self._free) if tensor.numel() == size), None)
        tensor = torch.empty(size) if place is None else self._free.pop(place)
        self._used.append(tensor)
        return tensor

    def release(self) -> None:
        """Make the tensors in use free."""
        self._free, self._used = self._used, []


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with weights, in pieces that fit into memory."""
    yield "model.embed_tokens", model.model.embed_tokens
    for number, layer in enumerate(model.model.layers):
        yield f"model.layers.{number}", layer
    yield "model.norm", model.model.norm
    yield "lm_head", model.lm_head


def _load(module: nn.Module, _: object, *, name: str, read: Reader, memory: _Memory) -> None:
    own = module.state_dict()
    memory.keep(tensor[0].numel() if ".experts." in part else tensor.numel() for part, tensor in own.items())
    module.load_state_dict({part: read(f"{name}.{part}", memory.allocate) for part in own}, assign=True)


def _release(module: nn.Module, _: object, __: object, *, memory: _Memory, progress: "tqdm[Any]") -> None:
    module.to_empty(device="meta")
    memory.release()
    progress.update()


def _read(checkpoint: Checkpoint, name: str, allocate: Allocate, dtype: str | None = None) -> Tensor:
    stored = name if name in checkpoint.tensors else name.replace("lm_head.", "model.embed_tokens.")  # they are tied
    return _floats(checkpoint, [checkpoint.whole(stored)], allocate, dtype).view(checkpoint.tensors[stored].shape)


def _floats(checkpoint: Checkpoint, parts: Sequence[Rows], allocate: Allocate, dtype: str | None = None) -> Tensor:
    """Return concatenated rows in float32, without intermediate copies. Shape: (rows, width)."""
    width = checkpoint.tensors[parts[0].tensor].shape[-1]
    flat, filled = allocate(width * sum(part.stop - part.start for part in parts)), 0
    for block in (block for part in parts for block in checkpoint.float_blocks(part)):
        flat[filled : filled + len(block)] = block if dtype is None else block.to(TORCH_DTYPES[dtype])
        filled += len(block)
    return flat.view(-1, width)
