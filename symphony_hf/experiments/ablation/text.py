"""The tokenized text of a study, prepared once and read by every run."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import models
from torch import Tensor

from symphony_hf.data.blocks import token_stream
from symphony_hf.data.corpus import corpus_of
from symphony_hf.data.documents import SPLITS, Document
from symphony_hf.data.rows import thinned
from symphony_hf.data.tokenizer import cached_tokenizer
from symphony_hf.errors import DataError
from symphony_hf.evaluation.clean_attacked import swap_words
from symphony_hf.files import replacing
from symphony_hf.recipe import Recipe

ATTACK_TOKEN = "AAA"
"""Replacement word of the attack. It is always in the vocabulary, as in WikiText-103's."""

VALIDATION_TOKENS = 16_384
"""Maximum number of validation tokens: enough to choose a learning rate, and few beside the test text."""


class StudyText(NamedTuple):
    """Token streams and their vocabulary.

    Attributes:
        train: Training tokens. All streams are int64. Shape: (tokens,).
        validation: Tokens of the validation documents.
        test: Tokens of the test documents.
        attacked: Tokens of the attacked test documents, as many as in `test`: each word is replaced by a word.
        vocab_size: Number of words, with `<eos>`, `<unk>` and the attack's.
        digest: Digest of all streams.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    attacked: Tensor
    vocab_size: int
    digest: str


def prepare_streams(recipe: Recipe, folder: Path) -> StudyText:
    """Read a recipe's text, attack its test split, and write the tokens to a folder.

    Raises:
        DataError: If the text does not exist, or a split is shorter than one row.
    """
    section, settings = recipe.data, recipe.eval
    corpus = corpus_of(section)
    tokenizer = cached_tokenizer(corpus, section.vocab_size - 1, kind="words")
    _add_word(tokenizer, ATTACK_TOKEN)
    test = thinned(corpus.test, settings.documents)
    streams = {
        "train": _stream(thinned(corpus.train, section.limit), tokenizer),
        "validation": _stream(corpus.validation, tokenizer)[:VALIDATION_TOKENS],
        "test": _stream(test, tokenizer),
        "attacked": _stream(swap_words(test, settings), tokenizer),
    }
    for name, stream in streams.items():
        if len(stream) < section.block_size:
            raise DataError(
                f"{corpus.source}: {name} has {len(stream):,} tokens, less than a row ({section.block_size})"
            )
    if len(streams["test"]) != len(streams["attacked"]):
        raise DataError(
            f"{corpus.source}: the attacked test text has a different number of tokens; does the tokenizer split words?"
        )
    digest = hashlib.sha256(str(len(tokenizer)).encode())
    for name, stream in streams.items():
        digest.update(name.encode() + stream.tobytes())
    tensors = {name: torch.from_numpy(stream) for name, stream in streams.items()}
    text = StudyText(**tensors, vocab_size=len(tokenizer), digest=digest.hexdigest())
    with replacing(_file(folder, text.digest)) as written, written.open("wb") as file:
        np.savez(file, **streams, vocab_size=np.array(text.vocab_size))  # type: ignore[arg-type]
    return text


def read_streams(folder: Path, digest: str) -> StudyText:
    """Read the streams that `prepare_streams` wrote for the text with this digest."""
    with np.load(_file(folder, digest), allow_pickle=False) as arrays:
        streams = {name: torch.from_numpy(arrays[name]) for name in (*SPLITS, "attacked")}
        return StudyText(**streams, vocab_size=int(arrays["vocab_size"]), digest=digest)


def _file(folder: Path, digest: str) -> Path:
    """Return the path for a digest, so that studies in one folder do not overwrite each other's text."""
    return folder / f"text-{digest[:16]}.npz"


def _add_word(tokenizer: Any, word: str) -> None:
    """Add a word to the vocabulary. `add_tokens` would also match it inside other words."""
    vocabulary = tokenizer.get_vocab()
    vocabulary.setdefault(word, len(vocabulary))
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token=tokenizer.unk_token)


def _stream(documents: Sequence[Document], tokenizer: Any) -> np.ndarray:
    return token_stream(documents, tokenizer).numpy()
