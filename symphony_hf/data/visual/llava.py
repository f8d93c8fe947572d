"""Conversations about images, in LLaVA's own form: data of kind `llava`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..extras import require
from ..padding import NO_LABEL
from ..prepared import PreparedData
from ..rows import thin_rows
from ..skipping import PROBLEM, without_problems
from ..steps import Step
from ..templates import REFUSED, ensure_chat_template, ensure_padding
from .batches import VisualCollator, VisualConversations, make_collator
from .images import encoded_problem
from .llava_json import digit_rows, read_llava
from .rendering import Renderer, make_renderer

if TYPE_CHECKING:
    from datasets import Dataset as Table

    from ...recipe import DataSection

_MANY = 20_000
"""Rows from which on several processes check and tokenize them."""

_MOST_PROCESSES = 8


def prepare_llava(section: "DataSection", processor: Any) -> PreparedData:
    """Read conversations about images, check every image once, and tokenize the text.

    Checks and tokens are kept in the cache of `datasets`, and found there by the next run.

    Args:
        section: Of a recipe.
        processor: The model's LlavaProcessor; its tokenizer is given a chat template and a padding token where it has
            none.

    Returns:
        Splits of `VisualConversations`; only those that the source has, since LLaVA is trained on all of it. Answers
        are cut at `block_size`; images are not.

    Raises:
        DataError: If there is no such file or folder, it is no list of conversations, a package is missing, or more
            than a tenth of the rows cannot be used.
    """
    require("PIL", "images")
    if section.path is None:
        require("sklearn", "the handwritten digits")
    notes: list[str] = []
    tokenizer = processor.tokenizer
    if processor.chat_template is None:
        ensure_chat_template(tokenizer, notes)
    collator = make_collator(processor, ensure_padding(tokenizer, notes))
    renderer = make_renderer(processor)
    images = None if section.images is None else Path(section.images).expanduser()
    rows = digit_rows() if section.path is None else read_llava(Path(section.path).expanduser(), images)
    splits = {}
    for split, table in rows.splits.items():
        table = _tokenized(thin_rows(table, section.limit), renderer, collator, section.block_size)
        splits[split] = VisualConversations(without_problems(table, f"{rows.source}, {split} split", notes))
    notes.append(f"{rows.source}: " + ", ".join(f"{len(splits[s]):,} {s} conversations" for s in splits))
    if "validation" not in splits:
        notes.append(f"{rows.source}: no row is held out for validation or testing")
    return PreparedData(
        kind="llava",
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        collator=collator,
        revision=rows.revision,
        num_tokens=sum(splits["train"].rows["num_tokens"][:]),
        notes=notes,
    )


def _tokenized(table: "Table", renderer: Renderer, collator: VisualCollator, block_size: int) -> "Table":
    settings = {
        "renderer": renderer,
        "image_id": collator.image_id,
        "tokens_per_image": collator.tokens_per_image,
        "block_size": block_size,
    }
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1) if len(table) >= _MANY else None
    return table.map(Step(tokenize_row, settings), num_proc=processes, desc="Checking images, tokenizing")


def tokenize_row(
    row: Mapping[str, Any], renderer: Renderer, image_id: int, tokens_per_image: int, block_size: int
) -> dict[str, Any]:
    """Check one row and tokenize it.

    Args:
        row: With `messages`, `images` and `problem`.
        renderer: Of the chat template.
        image_id: The token that stands for an image.
        tokens_per_image: How many it stands for.
        block_size: Tokens of a row, at most, those of images counted.

    Returns:
        `input_ids` and `labels`, in which every image is one token; `num_images`; `num_tokens`, those of images
        counted; and `problem`.
    """
    ids: list[int] = []
    labels: list[int] = []
    problem = row[PROBLEM] or next(filter(None, map(encoded_problem, row["images"])), "")
    if not problem:
        try:
            ids, labels = renderer.tokens(row["messages"])
        except TemplateError as error:
            problem = f"{REFUSED}: {error}"
    places = [place for place, token in enumerate(ids) if token == image_id]
    more = (tokens_per_image - 1) * len(places)
    kept = max(block_size - more, 0)
    labels = [NO_LABEL if token == image_id else label for token, label in zip(ids, labels, strict=True)][:kept]
    if not problem and len(places) != len(row["images"]):
        problem = f"a text that has the image token in it: {len(places)} for {len(row['images'])} images"
    if not problem and places and places[-1] >= kept:
        problem = f"images longer than block_size: the last ends at token {places[-1] + 1 + more}"
    if not problem and all(label == NO_LABEL for label in labels):
        problem = f"a question longer than block_size: no answer within {block_size} tokens"
    return {
        "input_ids": ids[:kept],
        "labels": labels,
        "num_images": len(row["images"]),
        "num_tokens": len(labels) + more,
        PROBLEM: problem,
    }
