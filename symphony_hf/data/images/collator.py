"""Dataset and collator of conversations about images, which are decoded when a batch is built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from symphony_hf.data.blocks import NO_LABEL, pad_rows
from symphony_hf.errors import DataError

from .decoding import EncodedImage, blank_image, decode

if TYPE_CHECKING:
    from datasets import Dataset as Table


class VisualRow(NamedTuple):
    """Conversation whose images are not decoded yet, with one token per image, and labels of the answers alone.

    `stand_in` is the image of another row, if this one has none.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[EncodedImage]
    stand_in: EncodedImage | None


class VisualConversations(Dataset[VisualRow]):
    """Dataset of conversations about images, read from the disk one at a time.

    Its `rows` are a table with the columns `input_ids`, `labels`, `images`, `num_images` and `messages`. One without an
    image in any row raises DataError.
    """

    def __init__(self, rows: "Table") -> None:
        self.rows = rows
        self._with_image = np.flatnonzero(rows["num_images"][:])
        if not len(self._with_image):
            raise DataError("data: no conversation has an image: use `kind: chat` for text")

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.rows)

    def __getitem__(self, index: int) -> VisualRow:
        """Return one conversation."""
        row = self.rows[index]
        stand_in = None
        if not row["images"]:
            # From all rows in turn, so that the routers of a vision tower see their usual distribution.
            stand_in = self.rows[int(self._with_image[index % len(self._with_image)])]["images"][0]
        return VisualRow(row["input_ids"], row["labels"], row["images"], stand_in)


@dataclass(frozen=True)
class VisualCollator:
    """Data collator that decodes and scales images, and expands each image token to the model's number of tokens.

    A batch without images gets the image of another row, so that every process uses every parameter: under ZeRO and
    DistributedDataParallel, all wait for a process whose vision tower has no gradients. The tokens of that image follow
    the shortest row, masked out of attention and of the loss, so the row changes only by rounding, and the routers of
    the text model do not count them. Routers of a vision tower or projector count them as those of any image.

    Args:
        processor: LlavaProcessor of transformers.
        image_id: Id of the token that stands for an image.
        tokens_per_image: Number of tokens of an image in the model.
        pad_id: Id of the padding token.
    """

    processor: Any
    image_id: int
    tokens_per_image: int
    pad_id: int

    def __call__(self, rows: Sequence[VisualRow]) -> dict[str, Tensor]:
        """Return a batch, padded on the right.

        Returns:
            `input_ids`, `labels` and `attention_mask`, shape (rows, longest), and `pixel_values`, shape (images,
            channels, height, width). With a stand-in image also `position_ids`, which its tokens do not advance.
        """
        expanded = [self.expand(row.input_ids, row.labels) for row in rows]
        images = [image for row in rows for image in row.images]
        if images:
            return pad_rows(expanded, self.pad_id) | {"pixel_values": self.pixels(images)}
        stand_in = next(row.stand_in for row in rows if row.stand_in is not None)
        return self._with_stand_in(expanded) | {"pixel_values": self.pixels([stand_in])}

    def expand(self, input_ids: Sequence[int], labels: Sequence[int]) -> dict[str, list[int]]:
        """Repeat each image token as often as an image has tokens in the model."""
        ids: list[int] = []
        targets: list[int] = []
        for token, label in zip(input_ids, labels, strict=True):
            times = self.tokens_per_image if token == self.image_id else 1
            ids += [token] * times
            targets += [label] * times
        return {"input_ids": ids, "labels": targets}

    def pixels(self, images: Sequence[EncodedImage]) -> Tensor:
        """Return the inputs of the vision tower. Shape: (images, channels, height, width)."""
        decoded = [decode(image) for image in images]
        return self.processor.image_processor(images=decoded, return_tensors="pt")["pixel_values"]

    def _with_stand_in(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        shortest = min(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        length = len(rows[shortest]["input_ids"])
        image = {"input_ids": [self.image_id] * self.tokens_per_image, "labels": [NO_LABEL] * self.tokens_per_image}
        rows = [*rows[:shortest], {name: rows[shortest][name] + image[name] for name in image}, *rows[shortest + 1 :]]
        batch = pad_rows(rows, self.pad_id)
        batch["attention_mask"][shortest, length:] = 0
        # Some position encodings depend on the highest position in the batch.
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        batch["position_ids"] = positions * batch["attention_mask"]
        return batch


def make_collator(processor: Any, pad_id: int) -> VisualCollator:
    """Build a collator; count the tokens of an image by running the processor.

    Raises DataError if the tokenizer has no token for an image, or the number of tokens depends on an image's shape.
    """
    token = processor.image_token
    ids = processor.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise DataError(f"the tokenizer has no token {token!r}: add it (`tokenizer.add_tokens({token!r})`), and resize")
    if getattr(processor, "patch_size", None) is None:
        raise DataError(f"{type(processor).__name__} has no `patch_size`: set it to the vision tower's")
    counts = set()
    for size in ((64, 64), (96, 32)):
        batch = processor(text=[token], images=[blank_image(size)], return_tensors="pt")
        counts.add(int((batch["input_ids"] == ids[0]).sum()))
    if len(counts) > 1:
        raise DataError(
            f"{type(processor).__name__} makes {sorted(counts)} tokens of images of different shapes; only a processor "
            "that makes as many of each is supported"
        )
    return VisualCollator(processor, ids[0], counts.pop(), pad_id)
