"""Conversations as tokens of which the answers alone are learned, by whatever chat template a processor has."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from ...errors import DataError
from ..conversations import Message
from ..padding import NO_LABEL

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
