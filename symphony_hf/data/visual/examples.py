"""Questions about images to measure models by: the first of each conversation, with its images checked."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..digests import digest_texts
from ..extras import require
from ..rows import Rows
from ..skipping import PROBLEM, without_problems
from .asking import VisualExample
from .images import EncodedImage, encoded_problem
from .llava_json import digit_rows, read_llava
from .questions import first_question

if TYPE_CHECKING:
    from datasets import Dataset

DIGITS = "digits"
"""As the data to evaluate on: scikit-learn's handwritten digits."""


def read_visual(data: str | None, images: str | None) -> Rows:
    """Read conversations about images.

    Args:
        data: LLaVA's JSON, or a folder of such files, named for splits; `digits` or None for scikit-learn's.
        images: The folder that image names are in; that of the JSON when None.

    Raises:
        DataError: If there is no such file or folder, it is no list of conversations, or a package is missing.
    """
    require("PIL", "images")
    if data is None or data == DIGITS:
        require("sklearn", "the handwritten digits")
        return digit_rows()
    return read_llava(Path(data).expanduser(), None if images is None else Path(images).expanduser())


def visual_examples(table: "Dataset", names: list[str], where: str, notes: list[str]) -> list[VisualExample]:
    """The first question of each conversation that has an image in it.

    Args:
        table: Rows of `read_visual`.
        names: Of the rows.
        where: What they are, in notes and errors.
        notes: Gets a line if any row is left out.

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
    """SHA-256 of all that a model is asked, images included."""
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
