"""Questions about images, from conversations about them, with answers to choose from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import DataError
from ..conversations import Message
from ..questions import Question, split_shared
from .batches import VisualCollator, VisualConversations
from .images import EncodedImage
from .rendering import PLACEHOLDER, make_renderer


def first_question(row: Mapping[str, Any]) -> tuple[list[Message], list[EncodedImage], str]:
    """What a conversation begins with: messages up to the first answer, their images, and that answer."""
    messages = row["messages"]
    end = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    num_images = sum(message["content"].count(PLACEHOLDER) for message in messages[:end])
    return messages[:end], row["images"][:num_images], messages[end]["content"].strip()


class VisualQuestions:
    """The first question of every conversation. Images are decoded when a question is looked at.

    Args:
        conversations: A split of `PreparedData`.
        collator: Of the same.
    """

    def __init__(self, conversations: VisualConversations, collator: VisualCollator) -> None:
        self.rows = conversations.rows
        self.collator = collator
        self.renderer = make_renderer(collator.processor)

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def answers(self) -> list[str]:
        """The right answers, for which no image is decoded."""
        return [first_question(row)[2] for row in self.rows]

    def choices(self, answers: Sequence[str]) -> Iterator[Question]:
        """Each question with the same answers to choose from.

        Raises:
            DataError: If a right answer is none of them, or the tokenizer cannot tell two apart.
        """
        for number in range(len(self)):
            asked, images, answer = first_question(self.rows[number])
            if answer not in answers:
                raise DataError(f"question {number}: the right answer, {answer!r}, is none of the {len(answers)} given")
            texts = [self.renderer.text([*asked, {"role": "assistant", "content": choice}]) for choice in answers]
            prompt, choices = split_shared([self._expanded(text) for text in texts], texts)
            yield Question(prompt, choices, answers.index(answer), self._pixels(images))

    def _expanded(self, text: str) -> list[int]:
        ids = self.renderer.ids(text)
        return self.collator.expand(ids, ids)["input_ids"]

    def _pixels(self, images: Sequence[EncodedImage]) -> Tensor | None:
        return self.collator.pixels(images) if images else None
