"""Conversations about images as a Trainer takes them: images are decoded, and their tokens put in, with the batch."""

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
    """A conversation, not yet decoded.

    Attributes:
        input_ids: Every image is one token.
        labels: Of the answers' tokens; `NO_LABEL` for the others. As many.
        images: Encoded, in the order of their tokens.
        stand_in: An image of another row, where this one has none.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[EncodedImage]
    stand_in: EncodedImage | None


class VisualConversations(Dataset[VisualRow]):
    """Rows of conversations about images, read from the disk one by one.

    Args:
        rows: With columns `input_ids`, `labels`, `images`, `num_images` and `messages`.

    Attributes:
        rows: Likewise.

    Raises:
        DataError: If no row has an image.
    """

    def __init__(self, rows: "Table") -> None:
        self.rows = rows
        self._with_image = np.flatnonzero(rows["num_images"][:])
        if not len(self._with_image):
            raise DataError("data: no conversation has an image; for text alone there is `kind: chat`")

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.rows)

    def __getitem__(self, index: int) -> VisualRow:
        """One of them."""
        row = self.rows[index]
        stand_in = None
        if not row["images"]:
            # Any row's will do; of all rows in turn, so that a vision tower's routers see what they see elsewhere.
            stand_in = self.rows[int(self._with_image[index % len(self._with_image)])]["images"][0]
        return VisualRow(row["input_ids"], row["labels"], row["images"], stand_in)


@dataclass(frozen=True)
class VisualCollator:
    """Makes batches: decodes and scales images, and puts as many tokens for each as the model makes of it.

    A batch without images gets one of another row, so that every process runs every parameter: under ZeRO and
    DistributedDataParallel all wait for one whose vision tower has no gradients. Its tokens stand behind the shortest
    row, are masked out of attention, and no label; so nothing of the row changes but by rounding, and the routers of
    the text model do not count them. Those of a vision tower or projector do, as they count any image.

    Args:
        processor: transformers' LlavaProcessor.
        image_id: The token that stands for an image.
        tokens_per_image: How many the model makes of one.
        pad_id: Fills the gaps in `input_ids`.
    """

    processor: Any
    image_id: int
    tokens_per_image: int
    pad_id: int

    def __call__(self, rows: Sequence[VisualRow]) -> dict[str, Tensor]:
        """One batch, padded on the right.

        Returns:
            `input_ids`, `labels` and `attention_mask`, shape (rows, longest), and `pixel_values`, shape (images,
            channels, height, width). With a stand-in image also `position_ids`, which do not go on over its tokens.
        """
        expanded = [self.expand(row.input_ids, row.labels) for row in rows]
        images = [image for row in rows for image in row.images]
        if images:
            return pad_rows(expanded, self.pad_id) | {"pixel_values": self.pixels(images)}
        stand_in = next(row.stand_in for row in rows if row.stand_in is not None)
        return self._with_stand_in(expanded) | {"pixel_values": self.pixels([stand_in])}

    def expand(self, input_ids: Sequence[int], labels: Sequence[int]) -> dict[str, list[int]]:
        """Put all of an image's tokens for the one that stands for it."""
        ids: list[int] = []
        targets: list[int] = []
        for token, label in zip(input_ids, labels, strict=True):
            times = self.tokens_per_image if token == self.image_id else 1
            ids += [token] * times
            targets += [label] * times
        return {"input_ids": ids, "labels": targets}

    def pixels(self, images: Sequence[EncodedImage]) -> Tensor:
        """The images as the vision tower takes them. Shape: (images, channels, height, width)."""
        decoded = [decode(image) for image in images]
        return self.processor.image_processor(images=decoded, return_tensors="pt")["pixel_values"]

    def _with_stand_in(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        shortest = min(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        length = len(rows[shortest]["input_ids"])
        image = {"input_ids": [self.image_id] * self.tokens_per_image, "labels": [NO_LABEL] * self.tokens_per_image}
        rows = [*rows[:shortest], {name: rows[shortest][name] + image[name] for name in image}, *rows[shortest + 1 :]]
        batch = pad_rows(rows, self.pad_id)
        batch["attention_mask"][shortest, length:] = 0
        # Some position encodings change for all tokens with the highest position.
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        batch["position_ids"] = positions * batch["attention_mask"]
        return batch


def make_collator(processor: Any, pad_id: int) -> VisualCollator:
    """Find out how a processor makes tokens of an image, by trying.

    Raises:
        DataError: If its tokenizer has no token for an image, or images of different shapes get different numbers.
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
