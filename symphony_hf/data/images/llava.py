"""Data of kind `llava`: conversations about images, in LLaVA's JSON."""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from symphony_hf.compat import __version__
from symphony_hf.data.blocks import NO_LABEL
from symphony_hf.data.chat_template import REFUSED, ensure_chat_template, ensure_padding
from symphony_hf.data.datasets import digest_files, digest_rows, digest_texts
from symphony_hf.data.documents import SPLIT_NAMES, split_of
from symphony_hf.data.messages import to_messages
from symphony_hf.data.prepared import PreparedData, Step, require
from symphony_hf.data.rows import PROBLEM, Rows, thin_rows, without_problems
from symphony_hf.errors import DataError

from .collator import VisualCollator, VisualConversations, make_collator
from .decoding import IMAGE_PROBLEMS, encoded_problem, handwritten_digits
from .processors import PLACEHOLDER, Renderer, make_renderer

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from datasets import Dataset as Table

    from symphony_hf.recipe import DataSection


DIGITS = "scikit-learn's handwritten digits"


def read_llava(path: Path, images: Path | None) -> Rows:
    """Read conversations in the format of LLaVA-558K and LLaVA-665K.

    Args:
        path: JSON list of `{id, image, conversations: [{from, value}, ...]}`, where `image` may be missing or a list;
            or folder of such files named after splits.
        images: Folder of the images; that of the JSON when None.

    Returns:
        Rows with the columns `messages`, `images` (encoded) and `problem`.

    Raises:
        DataError: If there is no such file or folder, or it is not a JSON list of conversations.
    """
    files = _files(path)
    folder = images if images is not None else (path if path.is_dir() else path.parent)
    if not folder.is_dir():
        raise DataError(f"images: `{folder}`: no such folder; give the one that the JSON's image names are in")
    digests = {split: digest_files([file]) for split, file in files.items()}
    splits = {split: _read(file, folder, digests[split]) for split, file in files.items()}
    return Rows(splits, digest_texts(digests.values()), str(path))


def digit_rows() -> Rows:
    """Return scikit-learn's handwritten digits as questions, in the three splits and columns of `read_llava`."""
    import datasets

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, (image, digit) in enumerate(zip(*handwritten_digits(), strict=True)):
        turns = [
            {"role": "user", "content": f"{PLACEHOLDER}\nWhich digit is shown?"},
            {"role": "assistant", "content": f"The digit is {digit}."},
        ]
        rows[split_of(f"digit {number}")].append({"messages": turns, "images": [image], PROBLEM: ""})
    tables = {split: datasets.Dataset.from_list(rows[split], features=_features()) for split in rows}
    digest = digest_rows([row["messages"], row["images"][0]["bytes"].hex()] for split in rows for row in rows[split])
    return Rows(tables, digest, DIGITS)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    if not path.exists():
        raise DataError(
            f"data: `{path}`: no such file; give `data.path` in a recipe, or `--data`: LLaVA's JSON; without it, the "
            "digits are used"
        )
    files = {SPLIT_NAMES[file.stem]: file for file in sorted(path.glob("*.json")) if file.stem in SPLIT_NAMES}
    if "train" not in files:
        found = ", ".join(sorted(file.name for file in path.glob("*.json"))) or "no JSON"
        raise DataError(f"data: `{path}`: no train.json in this folder ({found}); give the JSON file itself")
    return files


def _read(file: Path, folder: Path, digest: str) -> "Dataset":
    """Read one file, or load it from the cache of `datasets` if it was read with the same folder before."""
    import datasets

    known = {
        "file": str(file.resolve()),
        "folder": str(folder.resolve()),
        "digest": digest,
        "version": __version__,
    }
    try:
        return datasets.Dataset.from_generator(_rows, gen_kwargs=known, features=_features())
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _rows(file: str, folder: str, digest: str, version: str) -> Iterator[dict[str, Any]]:
    # digest and version are arguments for the cache alone: a changed file, or another version, is read again.
    try:
        entries = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: no JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file}: expected a JSON list of conversations, got {_describe(entries)}")
    if not any(isinstance(entry, dict) and "conversations" in entry for entry in entries):
        raise DataError(f"{file}: no entry has `conversations`; the first is {_describe(entries[0])}")
    for entry in entries:
        yield _row(entry, Path(folder))


def _row(entry: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(entry, dict):
        return {"messages": [], "images": [], PROBLEM: f"no conversation: {_describe(entry)}"}
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        return {"messages": [], "images": [], PROBLEM: f"no list of turns: {_describe(turns)}"}
    messages, problem = to_messages(turns)
    names = entry.get("image") or []
    names = [] if names != names else [names] if isinstance(names, str) else names  # NaN: a missing value of pandas
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problem, names = problem or f"no name of an image: {_describe(names)}", []
    num_placeholders = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if not problem and num_placeholders != len(names):
        problem = f"another number of images than of {PLACEHOLDER}: {len(names)} and {num_placeholders}"
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    images = [{"path": str(folder / name), "bytes": None} for name in names]
    return {"messages": messages, "images": images, PROBLEM: problem}


def _features() -> "Features":
    import datasets

    text = datasets.Value("string")
    return datasets.Features(
        {
            "messages": datasets.List({"role": text, "content": text}),
            "images": datasets.List(datasets.Image(decode=False)),
            PROBLEM: text,
        }
    )


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "an object with " + (", ".join(f"`{name}`" for name in list(value)[:5]) or "nothing")
    return f"{type(value).__name__}, {str(value)[:40]!r}"


_MANY = 20_000
"""Number of rows above which several processes check and tokenize them."""

_MOST_PROCESSES = 8


def prepare_llava(section: "DataSection", processor: Any) -> PreparedData:
    """Read conversations about images, check every image, and tokenize the text.

    Checks and tokens are kept in the cache of `datasets` for the next run.

    Args:
        section: Data section of a recipe.
        processor: The model's LlavaProcessor. Its tokenizer is given a chat template and a padding token if it has
            none.

    Returns:
        Splits of `VisualConversations`, only those that the source has, since LLaVA is trained on all of it. Answers
        are truncated at `block_size`; images are not.

    Raises:
        DataError: If there is no such file or folder, it is not a list of conversations, a package is missing, or more
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
    tokenize = functools.partial(
        table.map, Step(tokenize_row, settings), num_proc=processes, desc="Checking images, tokenizing"
    )
    tokenized = tokenize()
    return tokenize(load_from_cache_file=False) if _has_mended_images(table, tokenized) else tokenized


def _has_mended_images(table: "Table", tokenized: "Table") -> bool:
    """Whether an image that could not be read can be read by now: the cache knows the rows, and not their images."""
    return any(
        problem.startswith(IMAGE_PROBLEMS) and problem not in map(encoded_problem, table[index]["images"])
        for index, problem in enumerate(tokenized[PROBLEM][:])
    )


def tokenize_row(
    row: Mapping[str, Any], renderer: Renderer, image_id: int, tokens_per_image: int, block_size: int
) -> dict[str, Any]:
    """Check one row with `messages`, `images` and `problem`, and tokenize at most `block_size` tokens, images included.

    Returns:
        `input_ids` and `labels` with one token per image; `num_images`; `num_tokens`, including those of images; and
        `problem`.
    """
    ids: list[int] = []
    labels: list[int] = []
    problem = row[PROBLEM] or next(filter(None, map(encoded_problem, row["images"])), "")
    if not problem:
        try:
            ids, labels = renderer.tokens(row["messages"])
        except TemplateError as error:
            problem = f"{REFUSED}: {error}"
    image_indices = [index for index, token in enumerate(ids) if token == image_id]
    more = (tokens_per_image - 1) * len(image_indices)
    kept = max(block_size - more, 0)
    labels = [NO_LABEL if token == image_id else label for token, label in zip(ids, labels, strict=True)][:kept]
    if not problem and len(image_indices) != len(row["images"]):
        problem = f"a text that has the image token in it: {len(image_indices)} for {len(row['images'])} images"
    if not problem and image_indices and image_indices[-1] >= kept:
        problem = f"images longer than block_size: the last ends at token {image_indices[-1] + 1 + more}"
    if not problem and all(label == NO_LABEL for label in labels):
        problem = f"a question longer than block_size: no answer within {block_size} tokens"
    return {
        "input_ids": ids[:kept],
        "labels": labels,
        "num_images": len(row["images"]),
        "num_tokens": len(labels) + more,
        PROBLEM: problem,
    }
