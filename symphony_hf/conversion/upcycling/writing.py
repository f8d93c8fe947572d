"""Streaming of weights into safetensors files, laid out as by `save_pretrained`."""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from tqdm import tqdm

from symphony_hf.errors import UpcycleError
from symphony_hf.files import WEIGHTS_INDEX

from .checkpoint import ITEM_BYTES, TORCH_DTYPES, Checkpoint, Rows
from .options import UpcycleOptions
from .plan import PARTS, ExpertPart, Piece, PlannedTensor


class Contents:
    """Source of the bytes of planned tensors.

    Random numbers come from one NumPy stream for each router and each projection of an expert, so they do not depend on
    other layers or on the block size, and are the same on every machine.
    """

    def __init__(self, source: Checkpoint, options: UpcycleOptions) -> None:
        self.source = source
        self.options = options
        self._scale = functools.cache(self._root_mean_square)

    def blocks(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in blocks, each valid until the next."""
        if tensor.router is not None:
            yield _bytes_of(self._router(tensor.router, tensor.shape).to(TORCH_DTYPES[tensor.dtype]))
        elif not tensor.pieces:
            yield _bytes_of(torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype]))
        for piece in tensor.pieces:
            noisy = piece.expert is not None and self.options.noise > 0
            if noisy or tensor.dtype != self.source.tensors[piece.rows.tensor].dtype:
                yield from self._computed(piece, TORCH_DTYPES[tensor.dtype])
            else:
                yield from self.source.blocks(piece.rows)

    def _router(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        stream, std = self._stream(layer), self.options.router_std
        if self.options.router_init == "normal":
            return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)) * std
        # With the same standard deviation; with 1 / sqrt(3 * width) it is the initialization of nn.Linear.
        return (2 * torch.from_numpy(stream.random(shape, dtype=np.float32)) - 1) * (math.sqrt(3) * std)

    def _stream(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.options.seed, spawn_key=key))

    def _computed(self, piece: Piece, dtype: torch.dtype) -> Iterator[memoryview]:
        expert = piece.expert if self.options.noise > 0 else None
        stream = self._expert_stream(expert) if expert is not None else None
        for values in self.source.float_blocks(piece.rows):
            changed = values
            if stream is not None:
                drawn = torch.from_numpy(stream.standard_normal(len(values), dtype=np.float32))
                changed = values + drawn * (self.options.noise * self._scale(piece.rows))
            stored = changed.to(dtype)
            if torch.isinf(stored).any() and not torch.isinf(values).any():
                raise UpcycleError(
                    f"upcycle: `{piece.rows.tensor}` has values that {str(dtype).removeprefix('torch.')} cannot hold: "
                    "take `dtype: bfloat16`, or keep the checkpoint's own"
                )
            yield _bytes_of(stored)

    def _expert_stream(self, expert: ExpertPart) -> np.random.Generator:
        return self._stream(expert.layer, 1 + PARTS.index(expert.part), expert.expert)

    def _root_mean_square(self, rows: Rows) -> float:
        """Return the root mean square of some rows, the unit of the noise."""
        squares, count = 0.0, 0
        for values in self.source.float_blocks(rows):
            squares += values.double().square().sum().item()
            count += len(values)
        return math.sqrt(squares / count)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


_ORDER = ("F32", "BF16", "F16")
"""Order of types in a safetensors file: by size, and within a size by the library's own list."""

_HEADER_BYTES = 512
"""Upper bound on the bytes of an entry in a header or an index."""


_FILES_AT_A_TIME = 4
"""Files written at a time.

Nearly all time is the kernel's, which copies pages for one writer on one core. Three files of 5 GB at a time took 0.6
times as long as one after another, on two cores and ext4.
"""


class Shards:
    """Planned tensors, split into files of at most `max_shard_size`, in bytes or as in `5GB`.

    Larger tensors get their own files.
    """

    def __init__(self, planned: Sequence[PlannedTensor], max_shard_size: int | str) -> None:
        self.tensors = {tensor.name: tensor for tensor in planned}
        self.split = split_state_dict_into_shards_factory(
            self.tensors,
            get_storage_size=tensor_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(tensor_bytes, self.tensors.values()))

    @property
    def main_dtype(self) -> str:
        """Data type of most of the bytes."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor_bytes(tensor)
        return sizes.most_common(1)[0][0]

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """Upper bound on the bytes of the files, with headers and index."""
        return self.weight_bytes + 2 * _HEADER_BYTES * (len(self.tensors) + len(self.split.filename_to_tensors))

    def write(self, folder: Path, contents: Contents) -> None:
        """Write the files, several at a time, with an index if there are several."""
        stop = Event()
        with (
            tqdm(total=self.weight_bytes, desc="writing", unit="B", unit_scale=True, disable=None) as progress,
            ThreadPoolExecutor(_FILES_AT_A_TIME) as pool,
        ):
            try:
                jobs = [
                    pool.submit(
                        _write_file, folder / name, [self.tensors[key] for key in keys], contents, progress, stop
                    )
                    for name, keys in self.split.filename_to_tensors.items()
                ]
                for job in as_completed(jobs):
                    job.result()
            finally:  # an error in one file, or Ctrl-C, also ends the others
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if self.split.is_sharded:
            metadata = {"total_parameters": self.parameters, **self.split.metadata}
            index = {"metadata": metadata, "weight_map": self.split.tensor_to_filename}
            (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensor_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes of a planned tensor."""
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _write_file(
    path: Path, tensors: Sequence[PlannedTensor], contents: Contents, progress: "tqdm[Any]", stop: Event
) -> None:
    """Write the safetensors format: header length in 8 bytes, JSON header, tensors without gaps.

    The library itself writes only tensors that are in memory. Order and padding are the same as its own. Once `stop` is
    set, the file is left as it is, incomplete.
    """
    ordered = sorted(tensors, key=lambda tensor: (_ORDER.index(tensor.dtype), tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor_bytes(tensor)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for block in contents.blocks(tensor):
                if stop.is_set():
                    return
                file.write(block)
                with progress.get_lock():
                    progress.update(len(block))
