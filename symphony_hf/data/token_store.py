"""Tokenized documents on the disk, cached per texts and tokenizer, and mapped into memory."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .blocks import closed_ids, end_of_text
from .datasets import digest_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
"""Version of cache entries. Increase it when the same texts give different tokens."""

_COLUMN = "input_ids"


class TokenStore:
    """Concatenated tokens of documents, each followed by the end-of-text token.

    Args:
        texts: Texts of the documents.
        tokenizer: Tokenizer with an end-of-text token. Its other special tokens are not added.

    Attributes:
        starts: Index of each document's first token, and the total number of tokens. Shape: (documents + 1,), int64.

    Raises:
        ConfigError: If the tokenizer has no end-of-text token.
    """

    def __init__(self, texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        end_of_text(tokenizer)
        column = _tokenized(texts, tokenizer).data.column(_COLUMN)
        # Flat views of the mapped file, one per chunk.
        self._pieces = [piece.flatten().to_numpy() for piece in column.chunks]
        self._piece_starts = np.cumsum([0, *map(len, self._pieces)])
        lengths = [piece.value_lengths().to_numpy() for piece in column.chunks]
        self.starts = np.cumsum(np.concatenate([[0], *lengths]))

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to but not including `stop`, int64."""
        first, last = np.searchsorted(self._piece_starts, [start, stop - 1], side="right") - 1
        offset = self._piece_starts[first]
        pieces = self._pieces[first : last + 1]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return joined[start - offset : stop - offset].astype(np.int64)


def _table(texts: list[str]) -> "Dataset":
    """Return a table of the texts, whose offsets have 64 bits: with 32, a column ends at 2 GiB of text."""
    import datasets

    return datasets.Dataset.from_dict({"text": texts}, datasets.Features({"text": datasets.Value("large_string")}))


def _tokenized(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Return one row of token ids per text, from the cache of `datasets` if possible."""
    import datasets
    from datasets.fingerprint import Hasher

    key = digest_texts([str(_FORMAT), Hasher.hash(tokenizer), *texts])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "symphony_hf" / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return _table(texts).map(
        lambda batch: {_COLUMN: closed_ids(batch["text"], tokenizer)},
        batched=True,
        remove_columns="text",
        features=datasets.Features({_COLUMN: datasets.List(datasets.Value("int32"))}),
        cache_file_name=str(folder / f"{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key[:32],
        desc="Tokenizing",
    )
