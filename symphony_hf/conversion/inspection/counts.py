"""Parameters and bytes of a model by part and by data type, and the parameters that one token uses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import httpx  # the one that it calls, which depends on its version
from torch import Tensor, nn

from symphony_hf.errors import DataError

from .parts import Anatomy, Part
from .tensors import HeldTensor, held_tensors


@dataclass(frozen=True)
class PartCount:
    """Numbers of parameters of one part of a model.

    `active` is the number of parameters that one token uses, which for experts depends on the top-k; None if no router
    is known. `trainable` is the number of those that require a gradient.
    """

    part: Part
    total: int
    active: int | None
    trainable: int


def count_parts(model: nn.Module, anatomy: Anatomy | None = None) -> list[PartCount]:
    """Count a model's parameters by part, in the order of `Part`, without the parts that it does not have.

    Tied weights count once, quantized weights by their unpacked shape. Adjacencies count as `Part.GRAPHS`, including
    those that are buffers. The model may be on the meta device, adapted by PEFT, or quantized.
    """
    anatomy = anatomy or Anatomy(model)
    held_by_part: dict[Part, list[HeldTensor]] = {}
    for held in held_tensors(model):
        held_by_part.setdefault(anatomy.part_of(held), []).append(held)
    return [_count(part, held_by_part[part], anatomy) for part in Part if part in held_by_part]


def _count(part: Part, held: list[HeldTensor], anatomy: Anatomy) -> PartCount:
    total = sum(tensor.numel for tensor in held)
    trainable = sum(tensor.numel for tensor in held if tensor.tensor.requires_grad)
    if part is not Part.EXPERTS:
        return PartCount(part, total, total, trainable)
    shares = [_chosen_share(tensor, anatomy) for tensor in held]
    if None in shares:
        return PartCount(part, total, None, trainable)
    active = sum((share * tensor.numel for share, tensor in zip(shares, held, strict=True) if share), Fraction(0))
    return PartCount(part, total, round(active), trainable)


def _chosen_share(held: HeldTensor, anatomy: Anatomy) -> Fraction | None:
    """Return the share of a layer's experts that a token selects. Some routers also select experts without weights."""
    routing = anatomy.routing_of(held.name)
    if routing is None:
        return None
    stacked = held.shape[0] if len(held.shape) == 3 else routing.num_experts
    return Fraction(min(routing.top_k, stacked), stacked)


_PACKED = ".quant_state.bitsandbytes__"
"""Infix of the tensors that bitsandbytes stores beside a packed weight, followed by its type: nf4, fp4."""


@dataclass(frozen=True)
class TypeCount:
    """Parameters and bytes of one data type.

    Attributes:
        type: Name of the type, such as bfloat16, or nf4 for weights that bitsandbytes packed in 4 bits.
        parameters: Number of parameters; a byte of 4-bit weights holds two.
        bytes: Number of bytes, including the constants of a quantization.
    """

    type: str
    parameters: int
    bytes: int


def held_types(model: nn.Module) -> list[TypeCount]:
    """Return the types of a model's parameters and graphs in memory, the largest first."""
    counted = []
    for held in held_tensors(model):
        state = held.quant_state
        name = str(held.tensor.dtype).removeprefix("torch.") if state is None else state.quant_type
        size = held.numel * held.tensor.element_size() if state is None else held.tensor.nbytes + state_bytes(state)
        counted.append(TypeCount(name, held.numel, size))
    return _sum(counted)


def state_bytes(state: Any) -> int:
    """Return the bytes of a `bitsandbytes.functional.QuantState`: its scales, and the scales of quantized scales."""
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = getattr(state, "state2", None)
    return sum(tensor.nbytes for tensor in tensors) + (0 if nested is None else state_bytes(nested))


def stored_types(source: str | Path, revision: str | None = None) -> list[TypeCount] | None:
    """Return the types in a checkpoint's safetensors files, the largest first, by their headers alone; None if none.

    Of a model on the Hub, only the headers are downloaded. A single file is a config without weights.

    Raises:
        DataError: If a header cannot be read, a shard is missing, or the Hub cannot be reached.
    """
    if Path(source).is_file():
        return None
    try:
        if Path(source).is_dir():
            metadata = huggingface_hub.get_local_safetensors_metadata(source)
        else:
            metadata = huggingface_hub.get_safetensors_metadata(str(source), revision=revision)
    except NotASafetensorsRepoError:
        return None
    except (SafetensorsParsingError, FileNotFoundError) as error:
        raise DataError(f"`{source}`: {error}: is the checkpoint complete?") from error
    except (OSError, httpx.HTTPError) as error:
        raise DataError(f"`{source}`: the headers of its weights could not be read from the Hub: {error}") from error
    files = metadata.files_metadata.values()
    return _sum(_stored({name: info for file in files for name, info in file.tensors.items()}))


def _stored(tensors: Mapping[str, Any]) -> Iterable[TypeCount]:
    packed = dict(name.split(_PACKED) for name in tensors if _PACKED in name)
    for name, info in tensors.items():
        size = info.data_offsets[1] - info.data_offsets[0]
        if name in packed:
            yield TypeCount(packed[name], 2 * size, size)
            continue
        weight = name.partition(_PACKED)[0] if _PACKED in name else name.rpartition(".")[0]
        if weight in packed:  # a constant of its quantization
            yield TypeCount(packed[weight], 0, size)
        else:
            yield TypeCount(_torch_name(info.dtype), math.prod(info.shape), size)


def _torch_name(name: str) -> str:
    """Return torch's name of a safetensors type."""
    names = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}
    letters = name.rstrip("0123456789")
    return names[letters] + name[len(letters) :] if letters in names else name.lower()


def _sum(counted: Iterable[TypeCount]) -> list[TypeCount]:
    sums: dict[str, tuple[int, int]] = {}
    for count in counted:
        parameters, size = sums.get(count.type, (0, 0))
        sums[count.type] = (parameters + count.parameters, size + count.bytes)
    return sorted((TypeCount(name, *pair) for name, pair in sums.items()), key=lambda count: -count.bytes)
