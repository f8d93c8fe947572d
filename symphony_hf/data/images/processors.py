"""Questions about images as any processor makes inputs of them, whatever it calls them and however many they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError
from torch import Tensor

from symphony_hf.data.blocks import NO_LABEL
from symphony_hf.data.chat_template import ensure_chat_template, ensure_padding
from symphony_hf.data.messages import Message
from symphony_hf.errors import DataError

from .decoding import EncodedImage

if TYPE_CHECKING:
    from PIL.Image import Image


PLACEHOLDER = "<image>"
"""Of an image in LLaVA's conversations. The tokenizer's own may be another."""


@dataclass(frozen=True)
class Renderer:
    """A chat template, and how it takes images: as parts of a message, or as placeholders in its text.

    Args:
        owner: The processor or tokenizer whose `apply_chat_template` is used.
        tokenizer: Its tokenizer.
        image_token: The tokenizer's placeholder of an image.
        in_parts: Whether a message's content is a list of parts.
    """

    owner: Any
    tokenizer: Any
    image_token: str
    in_parts: bool

    def text(self, messages: list[Message], *, to_answer: bool = False) -> str:
        """The conversation as text; `to_answer`: up to where the next answer begins."""
        contents = [{"role": message["role"], "content": self._content(message["content"])} for message in messages]
        return self.owner.apply_chat_template(contents, tokenize=False, add_generation_prompt=to_answer)

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text; every image is one token."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def tokens(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation; every image is one token.

        Learned is an answer with what the template closes it with: the tokens from where those of the conversation up
        to the answer end, to where those of the conversation with the answer end. A template may close the last answer
        otherwise than one in the middle; then what both begin with is learned.
        """
        ids = self.ids(self.text(messages))
        labels = [NO_LABEL] * len(ids)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                start = _shared_length(self.ids(self.text(messages[:place], to_answer=True)), ids)
                stop = _shared_length(self.ids(self.text(messages[: place + 1])), ids)
                labels[start:stop] = ids[start:stop]
        return ids, labels

    def _content(self, text: str) -> Any:
        if not self.in_parts:
            return text.replace(PLACEHOLDER, self.image_token)
        pieces = [piece.strip() for piece in text.split(PLACEHOLDER)]
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
        return parts


def make_renderer(processor: Any) -> Renderer:
    """Find out how a processor's chat template takes images, by trying.

    Args:
        processor: With a tokenizer; the chat template is its own, or else the tokenizer's.

    Raises:
        DataError: If the template loses text or images either way.
    """
    owner = processor if processor.chat_template is not None else processor.tokenizer
    asked, answered = f"{PLACEHOLDER}\nwhich?", "this."
    probe = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    for in_parts in (True, False):
        renderer = Renderer(owner, processor.tokenizer, processor.image_token, in_parts)
        try:
            text = renderer.text(probe)
        except (TypeError, ValueError, TemplateError):
            continue
        if text.count(processor.image_token) == 1 and "which?" in text and answered in text:
            return renderer
    raise DataError(
        f"the chat template of {type(owner).__name__} loses the text or the image of a question: give it one that "
        f"takes content as a list of parts, or as a text with {processor.image_token!r} in it"
    )


def _shared_length(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


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
