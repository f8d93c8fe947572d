"""The text of a study as tokens, made once and read by every cell."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor

from ..data import Document, attack, cached_tokenizer, load_corpus
from ..data.blocks import closed_ids
from ..errors import DataError
from ..recipe import Recipe
from ..unfinished import flush

ATTACK_TOKEN = "AAA"
"""A word of the vocabulary, whether the training text has it or not, as WikiText-103's has it."""

VALIDATION_TOKENS = 16_384
"""At most: enough to choose a learning rate by, and little beside the test text."""


class StudyText(NamedTuple):
    """Streams of tokens, and how many different ones there are.

    Attributes:
        train: Shape: (tokens,), int64, as all.
        validation: Of the held-out documents for decisions.
        test: Of the test documents.
        attacked: Of the same, attacked: as many tokens, since a word becomes a word.
        vocab_size: Words, with `<eos>`, `<unk>` and the attack's.
        digest: Of all of them.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    attacked: Tensor
    vocab_size: int
    digest: str


def prepare_streams(recipe: Recipe, folder: Path) -> StudyText:
    """Read a recipe's text, attack its test split, and keep the tokens in a folder.

    Raises:
        DataError: If there is no such text, or a split of it is shorter than one row.
    """
    section, settings = recipe.data, recipe.eval
    corpus = load_corpus(section.path, text_column=section.text_column, name=section.name, revision=section.revision)
    tokenizer = cached_tokenizer(corpus, section.vocab_size - 1, kind="words")
    tokenizer.add_tokens([AddedToken(ATTACK_TOKEN, single_word=True, normalized=False)])
    test = _some(corpus.test, settings.documents)
    damaged = attack(test, rate=settings.attack_rate, minimum=settings.attack_minimum, seed=settings.seed)
    streams = {
        "train": _stream(_some(corpus.train, section.limit), tokenizer),
        "validation": _stream(corpus.validation, tokenizer)[:VALIDATION_TOKENS],
        "test": _stream(test, tokenizer),
        "attacked": _stream(damaged, tokenizer),
    }
    for name, stream in streams.items():
        if len(stream) < section.block_size:
            raise DataError(
                f"{corpus.source}: {name} has {len(stream):,} tokens, less than a row ({section.block_size})"
            )
    if len(streams["test"]) != len(streams["attacked"]):
        raise DataError(
            f"{corpus.source}: the attacked test text has another number of tokens; is a word of it cut up?"
        )
    digest = hashlib.sha256(str(len(tokenizer)).encode())
    for name, stream in streams.items():
        digest.update(name.encode() + stream.tobytes())
    _write(folder / "text.npz", {**streams, "vocab_size": np.array(len(tokenizer))})
    tensors = {name: torch.from_numpy(stream) for name, stream in streams.items()}
    return StudyText(**tensors, vocab_size=len(tokenizer), digest=digest.hexdigest())


def read_streams(folder: Path) -> StudyText:
    """What `prepare_streams` kept; without its digest."""
    with np.load(folder / "text.npz", allow_pickle=False) as arrays:
        streams = {name: torch.from_numpy(arrays[name]) for name in ("train", "validation", "test", "attacked")}
        return StudyText(**streams, vocab_size=int(arrays["vocab_size"]), digest="")


def _some(documents: list[Document], most: int | None) -> list[Document]:
    """Evenly spaced ones."""
    if most is None or len(documents) <= most:
        return documents
    return [documents[index * len(documents) // most] for index in range(most)]


def _stream(documents: list[Document], tokenizer: Any) -> np.ndarray:
    pieces = closed_ids([document.text for document in documents], tokenizer)
    return np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        temporary = Path(file.name)
        np.savez(file, **arrays)  # type: ignore[arg-type]
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)
