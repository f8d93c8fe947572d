"""Questions about images, taken from conversations, with answers to choose from."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from symphony_hf.data.datasets import digest_texts
from symphony_hf.data.messages import Message
from symphony_hf.data.prepared import require
from symphony_hf.data.questions import Question, split_shared
from symphony_hf.data.rows import PROBLEM, Rows, without_problems
from symphony_hf.errors import DataError

from .collator import VisualCollator, VisualConversations
from .decoding import EncodedImage, encoded_problem
from .llava import digit_rows, read_llava
from .processors import PLACEHOLDER, VisualExample, make_renderer

if TYPE_CHECKING:
    from datasets import Dataset


def first_question(row: Mapping[str, Any]) -> tuple[list[Message], list[EncodedImage], str]:
    """Return the messages of a conversation up to the first answer, their images, and that answer."""
    messages = row["messages"]
    end = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    num_images = sum(message["content"].count(PLACEHOLDER) for message in messages[:end])
    return messages[:end], row["images"][:num_images], messages[end]["content"].strip()


class VisualQuestions:
    """First question of every conversation. Images are decoded when a question is built."""

    def __init__(self, conversations: VisualConversations, collator: VisualCollator) -> None:
        self.rows = conversations.rows
        self.collator = collator
        self.renderer = make_renderer(collator.processor)

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def answers(self) -> list[str]:
        """Return the right answers without decoding images."""
        return [first_question(row)[2] for row in self.rows]

    def choices(self, answers: Sequence[str]) -> Iterator[Question]:
        """Yield each question with the same answers to choose from.

        Raises:
            DataError: If a right answer is not among them, or the tokenizer cannot distinguish two of them.
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


DIGITS = "digits"
"""Name of scikit-learn's handwritten digits as data to evaluate on."""


def read_visual(data: str | None, images: str | None) -> Rows:
    """Read conversations about images.

    Args:
        data: LLaVA's JSON, or a folder of such files named after splits; `digits` or None for scikit-learn's digits.
        images: Folder of the images; that of the JSON when None.

    Raises:
        DataError: If there is no such file or folder, it is not a list of conversations, or a package is missing.
    """
    require("PIL", "images")
    if data is None or data == DIGITS:
        require("sklearn", "the handwritten digits")
        return digit_rows()
    return read_llava(Path(data).expanduser(), None if images is None else Path(images).expanduser())


def visual_examples(table: "Dataset", names: list[str], where: str, notes: list[str]) -> list[VisualExample]:
    """Return the first question of each conversation, if it has an image. Rows that are left out are in a note.

    Raises:
        DataError: If more than a tenth of the rows cannot be used: an image is missing or does not decode, or there is
            no answer.
    """
    problems = [row[PROBLEM] or next(filter(None, map(encoded_problem, row["images"])), "") for row in table]
    table = table.remove_columns(PROBLEM).add_column(PROBLEM, problems).add_column("name", names)
    examples = [VisualExample(row["name"], *first_question(row)) for row in without_problems(table, where, notes)]
    with_images = [example for example in examples if example.images]
    if len(with_images) < len(examples):
        notes.append(f"{where}: {len(examples) - len(with_images)} questions without an image were left out")
    return with_images


def digest_of(examples: list[VisualExample]) -> str:
    """Return the SHA-256 of questions, answers and images."""
    return digest_texts(
        text
        for example in examples
        for text in (
            example.name,
            *(message["role"] + "\n" + message["content"] for message in example.messages),
            *(_digest_of_image(image) for image in example.images),
            example.answer,
        )
    )


def _digest_of_image(image: EncodedImage) -> str:
    encoded = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    return hashlib.sha256(encoded).hexdigest()
