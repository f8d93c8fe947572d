"""Inputs for questions about images, by the chat template and processor of any vision-language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError
from torch import Tensor

from symphony_hf.data.blocks import NO_LABEL
from symphony_hf.data.chat_template import ensure_chat_template, ensure_padding
from symphony_hf.data.messages import Message
from symphony_hf.data.questions import common_length
from symphony_hf.errors import DataError

from .decoding import EncodedImage

if TYPE_CHECKING:
    from PIL.Image import Image


PLACEHOLDER = "<image>"
"""Placeholder of an image in LLaVA's conversations. The tokenizer may have a different one."""


@dataclass(frozen=True)
class Renderer:
    """Chat template, with the form in which it takes images: as parts of a message, or as placeholders in its text.

    Args:
        owner: Processor or tokenizer whose `apply_chat_template` is used.
        tokenizer: Tokenizer of the processor.
        image_token: Placeholder of an image in the tokenizer.
        in_parts: Whether the content of a message is a list of parts.
        begins_texts: Whether the tokenizer puts a BOS in front of a text, and no other special token.
    """

    owner: Any
    tokenizer: Any
    image_token: str
    in_parts: bool
    begins_texts: bool = False

    def text(self, messages: list[Message], *, to_answer: bool = False) -> str:
        """Render a conversation; with `to_answer`, up to the beginning of the next answer."""
        contents = [{"role": message["role"], "content": self._content(message["content"])} for message in messages]
        return self.owner.apply_chat_template(contents, tokenize=False, add_generation_prompt=to_answer)

    def needs_bos(self, text: str) -> bool:
        """Whether the tokenizer adds its BOS to rendered text: if the template has not, as in transformers."""
        return self.begins_texts and not text.startswith(self.tokenizer.bos_token)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of rendered text, one token per image."""
        return self.tokenizer(text, add_special_tokens=self.needs_bos(text), verbose=False)["input_ids"]

    def tokens(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of a conversation, one token per image.

        The loss includes each answer and the end that the template gives it: the tokens between the end of the
        conversation up to the answer and the end of the conversation with the answer. If a template ends the last
        answer differently from others, only the common part is included.
        """
        ids = self.ids(self.text(messages))
        labels = [NO_LABEL] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = common_length(self.ids(self.text(messages[:index], to_answer=True)), ids)
                stop = common_length(self.ids(self.text(messages[: index + 1])), ids)
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
    """Build a renderer; determine by rendering a question how the chat template takes images.

    The template is the processor's, or else its tokenizer's. One that drops text or images in either form raises
    DataError.
    """
    owner = processor if processor.chat_template is not None else processor.tokenizer
    asked, answered = f"{PLACEHOLDER}\nwhich?", "this."
    probe = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    begins_texts = _begins_texts(processor.tokenizer)
    for in_parts in (True, False):
        renderer = Renderer(owner, processor.tokenizer, processor.image_token, in_parts, begins_texts)
        try:
            text = renderer.text(probe)
        except (TypeError, ValueError, TemplateError):
            continue
        if text.count(processor.image_token) == 1 and "which?" in text and answered in text:
            return renderer
    raise DataError(
        f"the chat template of {type(owner).__name__} drops the text or the image of a question: give it one that "
        f"takes content as a list of parts, or as a text with {processor.image_token!r} in it"
    )


def _begins_texts(tokenizer: Any) -> bool:
    whole, text = (tokenizer(".", add_special_tokens=added)["input_ids"] for added in (True, False))
    return whole == [tokenizer.bos_token_id, *text]


class VisualExample(NamedTuple):
    """Question about images, with the messages up to the right answer.

    `name` is its origin, unique in its data. It also seeds the attacks on its images.
    """

    name: str
    messages: list[Message]
    images: list[EncodedImage]
    answer: str


class Asked(NamedTuple):
    """Question with the decoded images to show to a model, attacked or not."""

    example: VisualExample
    images: "list[Image]"


@dataclass(frozen=True)
class Asker:
    """Builds the inputs of questions with a model's own processor and the renderer of its chat template."""

    processor: Any
    renderer: Renderer

    def prompts(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """Return inputs up to the beginning of the answers, padded on the left for `generate`."""
        texts = [self.renderer.text(one.example.messages, to_answer=True) for one in asked]
        return self._inputs(texts, asked, "left")

    def answered(self, asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, Tensor]:
        """Return inputs with an answer to each question, padded on the right."""
        texts = [
            self.renderer.text([*one.example.messages, {"role": "assistant", "content": answer}])
            for one, answer in zip(asked, answers, strict=True)
        ]
        return self._inputs(texts, asked, "right")

    def _inputs(self, texts: list[str], asked: Sequence[Asked], side: Literal["left", "right"]) -> dict[str, Tensor]:
        (needs_bos,) = set(map(self.renderer.needs_bos, texts))  # of one template
        return dict(
            self.processor(
                text=texts,
                images=[one.images for one in asked],
                padding=True,
                padding_side=side,
                add_special_tokens=needs_bos,
                return_tensors="pt",
            )
        )


def make_asker(processor: Any, notes: list[str]) -> Asker:
    """Build an asker for the processor of a vision-language model.

    Its tokenizer is given a chat template and a padding token if it has none, with a note for each.

    Raises:
        DataError: If there is no token for an image, or the chat template drops text or images.
    """
    if getattr(processor, "image_token", None) is None:
        raise DataError(f"{type(processor).__name__} has no `image_token`, the text that stands for an image: set it")
    if processor.chat_template is None:
        ensure_chat_template(processor.tokenizer, notes)
    ensure_padding(processor.tokenizer, notes)
    return Asker(processor, make_renderer(processor))
