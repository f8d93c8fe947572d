"""LLaVA's JSON of conversations about images, and the handwritten digits in the same form."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...errors import DataError
from ..conversations import to_messages
from ..digests import digest_files, digest_rows, digest_texts
from ..documents import SPLIT_NAMES, split_of
from ..rows import Rows
from ..skipping import PROBLEM
from .images import handwritten_digits
from .rendering import PLACEHOLDER

if TYPE_CHECKING:
    from datasets import Dataset, Features

DIGITS = "scikit-learn's handwritten digits"


def read_llava(path: Path, images: Path | None) -> Rows:
    """Read conversations, as LLaVA-558K and LLaVA-665K are published.

    Args:
        path: A JSON list of `{id, image, conversations: [{from, value}, ...]}`, where `image` may be missing, or a
            list; or a folder of such files, named for splits.
        images: The folder that image names are in; that of the JSON when None.

    Returns:
        Rows with columns `messages`, `images` (encoded, nothing is decoded) and `problem`.

    Raises:
        DataError: If there is no such file or folder, or it is no JSON list of conversations.
    """
    files = _files(path)
    folder = images if images is not None else (path if path.is_dir() else path.parent)
    if not folder.is_dir():
        raise DataError(f"data.images: `{folder}`: no such folder; give the one that the JSON's image names are in")
    digests = {split: digest_files([file]) for split, file in files.items()}
    splits = {split: _read(file, folder, digests[split]) for split, file in files.items()}
    return Rows(splits, digest_texts(digests.values()), str(path))


def digit_rows() -> Rows:
    """Scikit-learn's handwritten digits as questions, in three splits, in the form of `read_llava`."""
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
        raise DataError(f"data.path: `{path}`: no such file; give LLaVA's JSON, or leave data.path out for the digits")
    files = {SPLIT_NAMES[file.stem]: file for file in sorted(path.glob("*.json")) if file.stem in SPLIT_NAMES}
    if "train" not in files:
        found = ", ".join(sorted(file.name for file in path.glob("*.json"))) or "no JSON"
        raise DataError(f"data.path: `{path}`: no train.json in this folder ({found}); give the JSON file itself")
    return files


def _read(file: Path, folder: Path, digest: str) -> "Dataset":
    """From the cache of `datasets`, if the same file was read with the same folder before."""
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
    # The last two are there for the cache to tell one file, and one way to read it, from another.
    try:
        entries = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: no JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file}: expected a JSON list of conversations, got {_told(entries)}")
    if not any(isinstance(entry, dict) and "conversations" in entry for entry in entries):
        raise DataError(f"{file}: no entry has `conversations`; the first is {_told(entries[0])}")
    for entry in entries:
        yield _row(entry, Path(folder))


def _row(entry: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(entry, dict):
        return {"messages": [], "images": [], PROBLEM: f"no conversation: {_told(entry)}"}
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        return {"messages": [], "images": [], PROBLEM: f"no list of turns: {_told(turns)}"}
    messages, problem = to_messages(turns)
    names = entry.get("image") or []
    names = [names] if isinstance(names, str) else names
    num_placeholders = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if not problem and num_placeholders != len(names):
        problem = f"another number of images than of {PLACEHOLDER}: {len(names)} and {num_placeholders}"
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


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "an object with " + (", ".join(f"`{name}`" for name in list(value)[:5]) or "nothing")
    return f"{type(value).__name__}, {str(value)[:40]!r}"
