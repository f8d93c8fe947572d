"""Reading of safetensors checkpoints by block, with all headers checked first."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from symphony_hf.errors import CheckpointError, UpcycleError
from symphony_hf.files import WEIGHTS, read_weight_map
from symphony_hf.files import WEIGHTS_INDEX as INDEX

from .options import DTYPES

BLOCK = 2**20
"""Bytes read and written at a time: larger blocks were slower, smaller ones no faster.

So were `os.copy_file_range` and `os.sendfile`: with a flush, ranges of 2 MB took 1.4 times a plain copy's time on ext4,
where this took 1.04 times, one file after another. The kernel moves them page by page, since tensors begin at any byte.
"""

TORCH_DTYPES = {stored: getattr(torch, name) for name, stored in DTYPES.items()}
ITEM_BYTES = {stored: dtype.itemsize for stored, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Rows:
    """Range of rows of a tensor, viewed as a matrix whose width is its last dimension."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a file, with its data type's name in the safetensors format, and the position of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """Number of rows of the tensor viewed as a matrix."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] * ITEM_BYTES[self.dtype]


class Checkpoint:
    """Tensors of a checkpoint's folder, which has `model.safetensors`, or shards and their index.

    Raises:
        CheckpointError: If a file is missing or truncated, or does not match the index.
        UpcycleError: If a tensor is not float32, bfloat16 or float16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _stored_tensors(folder)
        for name, tensor in self.tensors.items():
            if tensor.dtype not in ITEM_BYTES:
                raise UpcycleError(
                    f"upcycle: `{tensor.file}` stores `{name}` as {tensor.dtype}: is it quantized? Take the checkpoint "
                    f"in {', '.join(DTYPES)}"
                )

    def whole(self, name: str) -> Rows:
        """Return all rows of a tensor."""
        return Rows(name, 0, self.tensors[name].rows)

    def blocks(self, rows: Rows) -> Iterator[memoryview]:
        """Yield the bytes of rows in blocks, each valid until the next."""
        stored = self.tensors[rows.tensor]
        left = (rows.stop - rows.start) * stored.row_bytes
        buffer = memoryview(bytearray(min(left, BLOCK)))
        with stored.file.open("rb") as file:
            file.seek(stored.offset + rows.start * stored.row_bytes)
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    raise CheckpointError(f"`{stored.file}` became shorter while `{rows.tensor}` was read from it")
                yield buffer[:count]
                left -= count

    def float_blocks(self, rows: Rows) -> Iterator[Tensor]:
        """Return the values of rows in float32, in blocks of shape (values,)."""
        dtype = TORCH_DTYPES[self.tensors[rows.tensor].dtype]
        return (torch.frombuffer(block, dtype=dtype).float() for block in self.blocks(rows))


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
    """Compare stored tensors with the shapes of those of the model's class.

    `tied` maps tensors that need not be stored to tensors that they equal.

    Raises:
        CheckpointError: If a tensor is missing or unexpected, or has another shape.
        UpcycleError: If tensors that the config ties are stored and differ.
    """
    found = checkpoint.tensors
    missing = sorted(set(expected) - set(found) - set(tied))
    unexpected = sorted(name for name in set(found) - set(expected) if not name.endswith(".rotary_emb.inv_freq"))
    shapes = [
        f"`{name}` is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [*(f"`{name}` is missing" for name in missing), *(f"`{name}` is unexpected" for name in unexpected)]
    problems += shapes
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"`{checkpoint.folder}`: its tensors are not those of the model in its config.json: "
            f"{'; '.join(problems[:5])}{more}"
        )
    for name, other in tied.items():
        if name in found and not same_bytes(checkpoint, checkpoint.whole(name), checkpoint.whole(other)):
            raise UpcycleError(
                f"upcycle: `{checkpoint.folder}`: config.json says `tie_word_embeddings: true`, but `{name}` and "
                f"`{other}` are stored and differ: set it to false if they are meant to be two"
            )


def same_bytes(checkpoint: Checkpoint, rows: Rows, others: Rows) -> bool:
    """Return whether two ranges of rows have the same type and the same bytes."""
    first, second = checkpoint.tensors[rows.tensor], checkpoint.tensors[others.tensor]
    if first.dtype != second.dtype or first.row_bytes != second.row_bytes:
        return False
    if rows.stop - rows.start != others.stop - others.start:
        return False
    pairs = zip(checkpoint.blocks(rows), checkpoint.blocks(others), strict=True)
    return all(left == right for left, right in pairs)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    index, single = folder / INDEX, folder / WEIGHTS
    if index.exists() and single.exists():
        raise CheckpointError(f"`{folder}` has both `{WEIGHTS}` and `{INDEX}`: delete the one that is stale")
    if single.exists():
        return _read_header(single)
    if not index.exists():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"only pickle files ({pickles[0]}), which can run code when they are read" if pickles else "neither"
        raise CheckpointError(
            f"`{folder}` needs `{WEIGHTS}` or `{INDEX}`, and has {found}. Load the model with transformers, and "
            "`save_pretrained` it"
        )
    return _read_shards(folder, read_weight_map(index, CheckpointError))


def _read_shards(folder: Path, file_of: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        if not (folder / file).exists():
            raise CheckpointError(f"`{folder / file}` is missing, which `{INDEX}` names: is the checkpoint complete?")
        for name, tensor in _read_header(folder / file).items():
            if file_of.get(name) != file:
                said = f"says that it is in `{file_of[name]}`" if name in file_of else "does not know it"
                raise CheckpointError(f"`{folder / file}` has `{name}`, but `{INDEX}` {said}")
            tensors[name] = tensor
    absent = sorted(set(file_of) - set(tensors))
    if absent:
        raise CheckpointError(f"`{folder / file_of[absent[0]]}` has no `{absent[0]}`, but `{INDEX}` says that it has")
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Read a safetensors header (8 bytes of length, then JSON) after safetensors has checked it."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(start - 8))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"`{file}` cannot be read as safetensors ({error}): is it cut off?") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
