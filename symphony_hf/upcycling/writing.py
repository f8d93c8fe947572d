"""Weights streamed into safetensors files, as `save_pretrained` of transformers would write them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from ..errors import ConfigError
from .checkpoint import INDEX, ITEM_BYTES
from .contents import Contents
from .plan import PlannedTensor

_ORDER = ("F32", "BF16", "F16")
"""In which safetensors puts the types into a file: by their size, and within one size as its own list has them."""

_HEADER_BYTES = 512
"""More than an entry of a header or of an index takes."""


class Shards:
    """Planned tensors, divided into files.

    Args:
        planned: The tensors, in their order.
        max_shard_size: Of a file, in bytes or as in `5GB`. A larger tensor has a file of its own.

    Raises:
        ConfigError: If it is no size.
    """

    def __init__(self, planned: Sequence[PlannedTensor], max_shard_size: int | str) -> None:
        self.tensors = {tensor.name: tensor for tensor in planned}
        try:
            self.split = split_state_dict_into_shards_factory(
                self.tensors,
                get_storage_size=tensor_bytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"upcycle: `max_shard_size` is {max_shard_size!r}: {error}") from error

    @property
    def weight_bytes(self) -> int:
        """Of all tensors."""
        return sum(map(tensor_bytes, self.tensors.values()))

    @property
    def parameters(self) -> int:
        """Of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """As much as the files may take, with their headers and the index."""
        return self.weight_bytes + 2 * _HEADER_BYTES * (len(self.tensors) + len(self.split.filename_to_tensors))

    def write(self, folder: Path, contents: Contents) -> None:
        """Write the files, and their index if there are several."""
        with tqdm(total=self.weight_bytes, desc="writing", unit="B", unit_scale=True, disable=None) as progress:
            for name, tensors in self.split.filename_to_tensors.items():
                _write_file(folder / name, [self.tensors[tensor] for tensor in tensors], contents, progress)
        if self.split.is_sharded:
            metadata = {"total_parameters": self.parameters, **self.split.metadata}
            index = {"metadata": metadata, "weight_map": self.split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensor_bytes(tensor: PlannedTensor) -> int:
    """The size of a planned tensor."""
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _write_file(path: Path, tensors: Sequence[PlannedTensor], contents: Contents, progress: "tqdm[Any]") -> None:
    """The published format: the header's length in 8 bytes, the header as JSON, then the tensors without a gap.

    safetensors itself writes only what is in memory whole. Order and spacing are those that it would take.
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
                file.write(block)
                progress.update(len(block))
