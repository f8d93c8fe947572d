"""Plan of an upcycled checkpoint: its tensors, and the rows of the dense checkpoint that they consist of."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from .checkpoint import Rows, StoredTensor
from .config import head_dim_of
from .families import DOWN, GATE, UP, Conversion, DenseFamily
from .options import UpcycleOptions

PARTS = (GATE, UP, DOWN)
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class ExpertPart:
    """One projection (`GATE`, `UP` or `DOWN`) of one expert of a decoder layer."""

    layer: int
    expert: int
    part: str


@dataclass(frozen=True)
class Piece:
    """Rows of the dense checkpoint, with the expert that they become part of, if any."""

    rows: Rows
    expert: ExpertPart | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor of the upcycled checkpoint.

    Attributes:
        name: Name in the file.
        shape: Shape of the tensor.
        dtype: Data type, by its name in safetensors files.
        pieces: Rows in order; a tensor without any is random or zero.
        router: Decoder layer index, if the tensor is a router's weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...] = ()
    router: int | None = None


def plan_tensors(
    stored: Mapping[str, StoredTensor],
    dense: PreTrainedConfig,
    conversion: Conversion,
    layers: Collection[int],
    options: UpcycleOptions,
) -> list[PlannedTensor]:
    """Plan the tensors of the upcycled checkpoint, layer by layer. The MLPs of `layers` become experts."""
    dtype, planned = options.stored_dtype, list[PlannedTensor]()
    mlps: dict[int, dict[str, Rows]] = {layer: {} for layer in layers}
    for name, rows in _split_projections(stored, dense, conversion.source):
        match = LAYER.fullmatch(name)
        layer = int(match[1]) if match else None
        if match and layer in mlps and match[2] in PARTS:
            mlps[layer][match[2]] = rows
            if len(mlps[layer]) == len(PARTS):
                kind = dtype or stored[rows.tensor].dtype
                planned += _sparse_block(layer, mlps[layer], conversion, dense, options.num_experts, kind)
            continue
        source = stored[rows.tensor]
        shape = (rows.stop - rows.start, *source.shape[1:]) if len(source.shape) > 1 else source.shape
        planned.append(PlannedTensor(name, shape, dtype or source.dtype, (Piece(rows),)))
        if match and match[2] in conversion.zero_biases and match[3] == "weight":
            planned.append(PlannedTensor(f"{name.removesuffix('weight')}bias", shape[:1], dtype or source.dtype))
    return planned


def _split_projections(
    stored: Mapping[str, StoredTensor], dense: PreTrainedConfig, family: DenseFamily
) -> Iterator[tuple[str, Rows]]:
    """Yield the dense tensors by Llama's names, in the order of the layers."""
    head_dim = head_dim_of(dense)
    heights = {
        "self_attn.q_proj": dense.num_attention_heads * head_dim,
        "self_attn.k_proj": dense.num_key_value_heads * head_dim,
        "self_attn.v_proj": dense.num_key_value_heads * head_dim,
        GATE: dense.intermediate_size,
        UP: dense.intermediate_size,
    }
    for name in sorted(stored, key=_layer_order):
        match = LAYER.fullmatch(name)
        parts: Sequence[str] = family.fused.get(match[2], ()) if match else ()
        if not match or not parts:
            yield name, Rows(name, 0, stored[name].rows)
            continue
        start = 0
        for part in parts:
            yield f"model.layers.{match[1]}.{part}.{match[3]}", Rows(name, start, start + heights[part])
            start += heights[part]


def _sparse_block(
    layer: int, mlp: Mapping[str, Rows], conversion: Conversion, dense: PreTrainedConfig, num_experts: int, dtype: str
) -> Iterator[PlannedTensor]:
    container, prefix = conversion.container, f"model.layers.{layer}."
    yield PlannedTensor(prefix + container.router, (num_experts, dense.hidden_size), dtype, router=layer)
    for name, shape in container.zeros.items():
        yield PlannedTensor(prefix + name, tuple(dense.hidden_size if n == "hidden" else n for n in shape), dtype)  # type: ignore[misc]
    for name, parts in container.experts.items():
        width = dense.intermediate_size if DOWN in parts else dense.hidden_size
        height = sum(mlp[part].stop - mlp[part].start for part in parts)
        pieces = [
            tuple(Piece(mlp[part], ExpertPart(layer, expert, part)) for part in parts) for expert in range(num_experts)
        ]
        if "{expert}" in name:
            for expert, own in enumerate(pieces):
                yield PlannedTensor(prefix + name.format(expert=expert), (height, width), dtype, own)
        else:
            stacked = tuple(piece for own in pieces for piece in own)
            yield PlannedTensor(prefix + name, (num_experts, height, width), dtype, stacked)


def _layer_order(name: str) -> tuple[int, str]:
    match = LAYER.fullmatch(name)
    return (int(match[1]), name) if match else (-1, name)


def expert_rows(planned: Sequence[PlannedTensor]) -> dict[ExpertPart, Rows]:
    """Return the rows of each projection of each expert in the upcycled checkpoint."""
    rows = {}
    for tensor in planned:
        start = 0
        for piece in tensor.pieces:
            stop = start + piece.rows.stop - piece.rows.start
            if piece.expert is not None:
                rows[piece.expert] = Rows(tensor.name, start, stop)
            start = stop
    return rows
