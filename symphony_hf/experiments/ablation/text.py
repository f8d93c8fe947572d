"""The tokenized text of a study, prepared once and read by every run."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import models
from torch import Tensor

from symphony_hf.data.blocks import token_stream
from symphony_hf.data.corpus import corpus_of
from symphony_hf.data.documents import Corpus, Document
from symphony_hf.data.rows import thinned
from symphony_hf.data.tokenizer import TokenizerKind, cached_tokenizer
from symphony_hf.errors import DataError
from symphony_hf.evaluation.clean_attacked import WORD_SWAP, swap_words
from symphony_hf.files import replacing

from .damage import reached_tokens, replace_at_random
from .study import Study

ATTACK_TOKEN = "AAA"
"""Replacement word of the attack. It is always in the vocabulary, as in WikiText-103's."""

VALIDATION_TOKENS = {"words": 16_384, "characters": 65_536}
"""Maximum number of validation tokens: enough to choose a learning rate, and few beside the test text."""

MAX_EPOCHS = 4
"""Maximum number of times that a run may read its text: beyond it, a study measures memorization."""

_ATTACKED = "attacked "
"""Prefix of the attacked streams in the file."""


class StudyText(NamedTuple):
    """Token streams and their vocabulary.

    Attributes:
        train: Training tokens, without the study's contamination. All streams are int64. Shape: (tokens,).
        validation: Tokens of the validation documents.
        test: Tokens of the test documents.
        attacked: Forms of `test` by attack, of the same length: each changed token is replaced by one token.
        vocab_size: Number of tokens, with `<eos>`, `<unk>` and, for words, the attack's.
        digest: Digest of all streams.
        pretrain: Tokens to pre-train on, in a fine-tuning study.
        forgotten: Tokens of the test split of that text.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    attacked: dict[str, Tensor]
    vocab_size: int
    digest: str
    pretrain: Tensor | None = None
    forgotten: Tensor | None = None


def prepare_streams(study: Study, folder: Path) -> StudyText:
    """Read a study's text, attack its test split, and write the tokens to a folder.

    Raises:
        DataError: If the text does not exist or is too short, or the attack changes its length, or nothing.
    """
    section, settings = study.recipe.data, study.recipe.eval
    corpus = _corpus(study, section.path)
    first = None if study.pretraining is None else _corpus(study, study.pretraining.path)
    kind: TokenizerKind = "characters" if study.by_characters else "words"
    # The vocabulary is that of the first text that a model is trained on.
    tokenizer = cached_tokenizer(first or corpus, section.vocab_size - 1, kind=kind)
    if not study.by_characters:
        _add_word(tokenizer, ATTACK_TOKEN)
    test = thinned(corpus.test, settings.documents)
    streams = {
        "train": _stream(thinned(corpus.train, section.limit), tokenizer),
        "validation": _stream(corpus.validation, tokenizer)[: VALIDATION_TOKENS[kind]],
        "test": _stream(test, tokenizer)[: study.test_tokens],
    }
    if first is not None:
        streams["pretrain"] = _stream(thinned(first.train, section.limit), tokenizer)
        streams["forgotten"] = _stream(thinned(first.test, settings.documents), tokenizer)[: study.test_tokens]
    _check_lengths(study, corpus.source, corpus.source if first is None else first.source, streams)
    vocab_size = len(tokenizer)
    if study.by_characters:
        for rate in study.damage:
            streams[f"{_ATTACKED}{rate:g}"] = replace_at_random(streams["test"], rate, vocab_size, settings.seed)
    else:
        streams[_ATTACKED + WORD_SWAP] = _stream(swap_words(test, settings), tokenizer)[: study.test_tokens]
    for name, stream in streams.items():
        if name.startswith(_ATTACKED):
            _check_attacked(study, f"{corpus.source}: {name}", streams["test"], stream)
    digest = hashlib.sha256(str(vocab_size).encode())
    for name, stream in streams.items():
        digest.update(name.encode() + stream.tobytes())
    path = _file(folder, digest.hexdigest())
    if not path.exists():
        with replacing(path) as written, written.open("wb") as file:
            np.savez(file, **streams, vocab_size=np.array(vocab_size))  # type: ignore[arg-type]
    return read_streams(folder, digest.hexdigest())


def contaminated(study: Study, text: StudyText) -> Tensor:
    """Return a study's training tokens, with its contamination. Shape: (tokens,)."""
    seed = study.recipe.eval.seed
    return torch.from_numpy(replace_at_random(text.train.numpy(), study.contamination, text.vocab_size, seed))


def read_streams(folder: Path, digest: str) -> StudyText:
    """Read the streams that `prepare_streams` wrote for the text with this digest."""
    with np.load(_file(folder, digest), allow_pickle=False) as arrays:
        streams = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "vocab_size"}
        attacked = {name: streams.pop(name) for name in list(streams) if name.startswith(_ATTACKED)}
        return StudyText(
            **streams,
            attacked={name.removeprefix(_ATTACKED): stream for name, stream in attacked.items()},
            vocab_size=int(arrays["vocab_size"]),
            digest=digest,
        )


def _corpus(study: Study, path: str | None) -> Corpus:
    section = study.recipe.data
    return corpus_of(section if path == section.path else replace(section, path=path, name=None, revision=None))


def _check_lengths(study: Study, source: str, first_source: str, streams: dict[str, np.ndarray]) -> None:
    """Refuse a text that is too short, before anything is run."""
    block_size = study.recipe.data.block_size
    sources = dict.fromkeys(streams, source) | dict.fromkeys(("pretrain", "forgotten"), first_source)
    for name, stream in streams.items():
        if len(stream) < block_size:
            raise DataError(f"{sources[name]}: {name} has {len(stream):,} tokens, less than a row ({block_size})")
    needed = {"train": study.tokens}
    if study.pretraining is not None:
        needed["pretrain"] = study.tokens // study.steps * study.pretraining.max_steps
    for name, tokens in needed.items():
        epochs = tokens / len(streams[name])
        if epochs > MAX_EPOCHS:
            raise DataError(
                f"{sources[name]}: {name} has {len(streams[name]):,} tokens, and a run reads {tokens:,}, which is "
                f"{epochs:.1f} times the text: give more text or fewer steps, for at most {MAX_EPOCHS} times"
            )


def _check_attacked(study: Study, where: str, test: np.ndarray, attacked: np.ndarray) -> None:
    """Refuse an attack whose effect no run could measure."""
    if len(attacked) != len(test):
        raise DataError(f"{where}: another number of tokens than the test text; does the tokenizer split words?")
    if not reached_tokens(torch.from_numpy(test == attacked), study.recipe.data.block_size).any():
        setting = "`damage`" if study.by_characters else "`eval.attack_rate`"
        raise DataError(f"{where}: no token has an attacked one before it in its row: raise the study's {setting}")


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
