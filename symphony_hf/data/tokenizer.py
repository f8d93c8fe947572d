"""A tokenizer of the corpus's own, of pieces of words or of whole ones, trained in seconds and then kept."""

import hashlib
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from symphony_hf.errors import ConfigError, SymphonyWarning

from .documents import Corpus, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
_SPECIAL = (END_OF_TEXT, PADDING)
END_OF_LINE, UNKNOWN = "<eos>", "<unk>"
"""Words of a vocabulary of words, as WikiText-103's has them: the end of a line, and every word that is not in it."""

TokenizerKind = Literal["bpe", "words"]
_SMALLEST = len(_SPECIAL) + 256

_FORMAT = 1
"""Of a cache entry. Raise it when the same texts should give another tokenizer."""

_TOKENIZER, _DIGEST = "tokenizer.json", "tokenizer.json.sha256"


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int = 4096, kind: TokenizerKind = "bpe"
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer.

    Args:
        documents: Texts to train on, of the train split only.
        vocab_size: Number of tokens, special ones included. A short text may give fewer.
        kind: `bpe`: byte-level BPE, with which any text can be encoded, and decodes to itself; `<|endoftext|>` (id 0)
            begins and ends a text, `<|pad|>` (id 1) fills a batch. `words`: what whitespace separates, the most
            frequent ones; `<eos>` (id 0) is the end of a line and of a text, `<unk>` (id 1) every other word.

    Returns:
        The tokenizer, which puts no special token in front or behind by itself.

    Raises:
        ConfigError: If `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    texts = [document.text for document in documents]
    if kind == "words":
        return _wrap(_count_words(texts, vocab_size))
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"data: vocab_size must be {_SMALLEST} or more (256 bytes, 2 special tokens); got {vocab_size}"
        )
    return _wrap(_train(texts, vocab_size))


def cached_tokenizer(
    corpus: Corpus, vocab_size: int = 4096, cache_dir: Path | None = None, kind: TokenizerKind = "bpe"
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer on the train split, or load the one trained on the same texts before.

    Args:
        corpus: Where the texts come from.
        vocab_size: Number of tokens, special ones included.
        cache_dir: Where entries are kept: `$SYMPHONY_HF_CACHE` if None, or else `symphony_hf` in the user's cache
            folder (`$XDG_CACHE_HOME`, `~/.cache`).
        kind: See `train_tokenizer`.

    Returns:
        The same tokenizer as `train_tokenizer`.

    Raises:
        ConfigError: If `vocab_size` has no room for the 256 bytes and the special tokens.

    Warns:
        SymphonyWarning: If the entry was damaged, and is replaced; or could not be written.
    """
    entry = (cache_dir or _default_cache()) / "tokenizers" / _key(corpus.train, vocab_size, kind)
    stored = _read(entry)
    if stored is not None:
        return _wrap(stored)
    tokenizer = train_tokenizer(corpus.train, vocab_size, kind)
    try:
        _write(entry, tokenizer.backend_tokenizer.to_str())
    except OSError as error:
        warnings.warn(f"{entry}: the tokenizer could not be kept ({error})", SymphonyWarning, stacklevel=2)
    return tokenizer


def _train(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def _count_words(texts: list[str], vocab_size: int) -> Tokenizer:
    # Of equally frequent words the first in the alphabet, so that the same texts give the same vocabulary.
    counts = Counter(word for text in texts for word in text.split() if word not in (END_OF_LINE, UNKNOWN))
    most_frequent = sorted(counts, key=lambda word: (-counts[word], word))
    words = [END_OF_LINE, UNKNOWN, *most_frequent][:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer.model, models.WordLevel):
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END_OF_LINE, pad_token=END_OF_LINE, unk_token=UNKNOWN
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
    )


def _default_cache() -> Path:
    if folder := os.environ.get("SYMPHONY_HF_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "symphony_hf"


def _key(documents: Sequence[Document], vocab_size: int, kind: TokenizerKind) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {vocab_size} {kind}".encode())
    for document in documents:
        text = document.text.encode()
        digest.update(len(text).to_bytes(8, "big"))  # so that ["ab", "c"] is not ["a", "bc"]
        digest.update(text)
    return digest.hexdigest()


def _read(entry: Path) -> Tokenizer | None:
    try:
        serialized = (entry / _TOKENIZER).read_bytes()
        digest = (entry / _DIGEST).read_text(encoding="ascii", errors="replace")
    except OSError:  # not there, or not for us to read
        return None
    # Compared before parsing, because `tokenizers` raises a bare Exception on what it cannot parse.
    if hashlib.sha256(serialized).hexdigest() != digest:
        warnings.warn(f"{entry}: the cached tokenizer is damaged; training it again", SymphonyWarning, stacklevel=3)
        return None
    return Tokenizer.from_str(serialized.decode())


def _write(entry: Path, serialized: str) -> None:
    """Put both files in place, each whole or not at all.

    Processes that race write the same bytes, because training is deterministic; so it does not matter whose file
    stays, nor that a reader may find the first without the second: it then trains for itself.
    """
    entry.mkdir(parents=True, exist_ok=True)
    contents = serialized.encode()
    with tempfile.TemporaryDirectory(dir=entry, prefix=".") as temporary:
        for name, data in ((_TOKENIZER, contents), (_DIGEST, hashlib.sha256(contents).hexdigest().encode())):
            Path(temporary, name).write_bytes(data)
            os.replace(Path(temporary, name), entry / name)
