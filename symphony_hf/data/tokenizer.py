"""Tokenizers trained on a corpus, of subwords, of whole words or of characters, and their cache."""

import hashlib
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from symphony_hf.errors import ConfigError, SymphonyWarning

from .datasets import digest_texts
from .documents import Corpus, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
_SPECIAL = (END_OF_TEXT, PADDING)
END_OF_LINE, UNKNOWN = "<eos>", "<unk>"
"""Special tokens of words, as in WikiText-103, and of characters: the end of a line (of a text, for characters), and
what is not in the vocabulary."""

TokenizerKind = Literal["bpe", "words", "characters"]
_SMALLEST = len(_SPECIAL) + 256

_FORMAT = 1
"""Version of cache entries. Increase it when the same texts give a different tokenizer."""

_TOKENIZER, _DIGEST = "tokenizer.json", "tokenizer.json.sha256"


def has_vocabulary(processor: Any) -> bool:
    """Whether a tokenizer, or that of a processor, has tokens beside its special ones.

    For a checkpoint without the files of one, transformers builds an empty tokenizer of the model's usual class.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    return hasattr(tokenizer, "get_vocab") and bool(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens))


def digest_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tokens in the order of their ids, in hexadecimal.

    It is the same in any version of `tokenizers`, and after a call that pads or truncates, which the tokenizer keeps.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    return digest_texts(sorted(ids, key=ids.__getitem__))


def special_ids(kind: TokenizerKind) -> dict[str, int | None]:
    """Return the ids of the special tokens of a trained tokenizer, by their names in a model's config."""
    if kind == "bpe":
        end = _SPECIAL.index(END_OF_TEXT)
        return {"pad_token_id": _SPECIAL.index(PADDING), "bos_token_id": end, "eos_token_id": end}
    return {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int = 4096, kind: TokenizerKind = "bpe"
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer.

    Args:
        documents: Texts to train on, from the train split only.
        vocab_size: Number of tokens, including special ones. A short text may give fewer.
        kind: `bpe`: byte-level BPE, which encodes any text losslessly, with `<|endoftext|>` (id 0) at the end of a text
            and `<|pad|>` (id 1) as padding. `words`: the most frequent words, separated by whitespace, with `<eos>`
            (id 0) at the end of a line and of a text, and `<unk>` (id 1) for every other word. `characters`: the most
            frequent characters, with `<eos>` (id 0) at the end of a text and `<unk>` (id 1) for every other one.

    Returns:
        The tokenizer, which adds no special tokens by itself.

    Raises:
        ConfigError: If `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    texts = [document.text for document in documents]
    if kind == "words":
        return _wrap(_count_words(texts, vocab_size))
    if kind == "characters":
        return _wrap(_count_characters(texts, vocab_size))
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"data: vocab_size must be {_SMALLEST} or more (256 bytes, 2 special tokens); got {vocab_size}"
        )
    return _wrap(_train(texts, vocab_size))


def cached_tokenizer(
    corpus: Corpus, vocab_size: int = 4096, cache_dir: Path | None = None, kind: TokenizerKind = "bpe"
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer on the train split of a corpus, or load it from the cache.

    Args:
        corpus: Corpus whose train split to train on.
        vocab_size: Number of tokens, including special ones.
        cache_dir: Folder of the cache. When None: `$SYMPHONY_HF_CACHE`, or `symphony_hf` in the user's cache folder
            (`$XDG_CACHE_HOME`, `~/.cache`).
        kind: See `train_tokenizer`.

    Returns:
        The same tokenizer as `train_tokenizer`.

    Raises:
        ConfigError: If `vocab_size` is too small for the 256 bytes and the special tokens.

    Warns:
        SymphonyWarning: If the cache entry is damaged and is replaced, or cannot be written.
    """
    entry = (cache_dir or _default_cache()) / "tokenizers" / _key(corpus.train, vocab_size, kind)
    stored = _read(entry)
    if stored is not None:
        return _wrap(stored)
    tokenizer = train_tokenizer(corpus.train, vocab_size, kind)
    try:
        _write(entry, tokenizer.backend_tokenizer.to_str())
    except OSError as error:
        warnings.warn(f"{entry}: the tokenizer could not be cached ({error})", SymphonyWarning, stacklevel=2)
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
    counts = Counter(word for text in texts for word in text.split() if word not in (END_OF_LINE, UNKNOWN))
    tokenizer = _most_frequent(counts, vocab_size)
    tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _count_characters(texts: list[str], vocab_size: int) -> Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    tokenizer = _most_frequent(counts, vocab_size)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _most_frequent(counts: Counter[str], vocab_size: int) -> Tokenizer:
    # Ties are broken alphabetically, so that the same texts give the same vocabulary.
    most_frequent = sorted(counts, key=lambda token: (-counts[token], token))
    tokens = [END_OF_LINE, UNKNOWN, *most_frequent][:vocab_size]
    return Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))


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
    return digest_texts([f"{_FORMAT} {vocab_size} {kind}", *(document.text for document in documents)])


def _read(entry: Path) -> Tokenizer | None:
    try:
        serialized = (entry / _TOKENIZER).read_bytes()
        digest = (entry / _DIGEST).read_text(encoding="ascii", errors="replace")
    except OSError:  # missing, or not readable
        return None
    # Compared before parsing because `tokenizers` raises a bare Exception for text that it cannot parse.
    if hashlib.sha256(serialized).hexdigest() != digest:
        warnings.warn(f"{entry}: the cached tokenizer is damaged; training it again", SymphonyWarning, stacklevel=3)
        return None
    return Tokenizer.from_str(serialized.decode())


def _write(entry: Path, serialized: str) -> None:
    """Write both files of a cache entry, each atomically.

    Training is deterministic, so threads and processes that race write the same bytes. A reader that finds only the
    first file trains for itself.
    """
    entry.mkdir(parents=True, exist_ok=True)
    contents = serialized.encode()
    with tempfile.TemporaryDirectory(dir=entry, prefix=".") as temporary:  # its name differs between threads, too
        for name, data in ((_TOKENIZER, contents), (_DIGEST, hashlib.sha256(contents).hexdigest().encode())):
            Path(temporary, name).write_bytes(data)
            os.replace(Path(temporary, name), entry / name)
