"""Questions about images as any processor makes inputs of them, whatever it calls them and however many they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from ...errors import DataError
from ..conversations import Message
from ..templates import ensure_chat_template, ensure_padding
from .images import EncodedImage
from .rendering import Renderer, make_renderer

if TYPE_CHECKING:
    from PIL.Image import Image


class VisualExample(NamedTuple):
    """A question about images.

    Attributes:
        name: Says where it came from, and seeds what its images are damaged by. Unique in its data.
        messages: Up to the answer, with placeholders for images.
        images: Encoded, one at least.
        answer: The right one.
    """

    name: str
    messages: list[Message]
    images: list[EncodedImage]
    answer: str


class Asked(NamedTuple):
    """A question with its images as they are to be seen: decoded, and perhaps damaged."""

    example: VisualExample
    images: "list[Image]"


@dataclass(frozen=True)
class Asker:
    """Puts questions to a model through its own processor.

    Args:
        processor: With a tokenizer and an image processor.
        renderer: Of its chat template.
    """

    processor: Any
    renderer: Renderer

    def prompts(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """Inputs up to where the answers begin, padded on the left, as `generate` needs it."""
        texts = [self.renderer.text(one.example.messages, to_answer=True) for one in asked]
        return self._inputs(texts, asked, "left")

    def answered(self, asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, Tensor]:
        """Inputs with an answer to each question, padded on the right, where no token of a causal model sees it."""
        texts = [
            self.renderer.text([*one.example.messages, {"role": "assistant", "content": answer}])
            for one, answer in zip(asked, answers, strict=True)
        ]
        return self._inputs(texts, asked, "right")

    def _inputs(self, texts: list[str], asked: Sequence[Asked], side: Literal["left", "right"]) -> dict[str, Tensor]:
        # Chat templates bring the special tokens of a text themselves.
        return dict(
            self.processor(
                text=texts,
                images=[one.images for one in asked],
                padding=True,
                padding_side=side,
                add_special_tokens=False,
                return_tensors="pt",
            )
        )


def make_asker(processor: Any, notes: list[str]) -> Asker:
    """Find out how a processor takes questions about images.

    Args:
        processor: Of a vision-language model. Its tokenizer is given a chat template and a padding token where it has
            none.
        notes: Gets what is to be said of that.

    Raises:
        DataError: If it has no token for an image, or a chat template that loses text or images.
    """
    if getattr(processor, "image_token", None) is None:
        raise DataError(f"{type(processor).__name__} has no `image_token`, the text that stands for an image: set it")
    if processor.chat_template is None:
        ensure_chat_template(processor.tokenizer, notes)
    ensure_padding(processor.tokenizer, notes)
    return Asker(processor, make_renderer(processor))
