"""Two domains of text that every Python has: the source code of its standard library, and its reference in prose.

The prose is in a script of its own, as another language would be: no token is in both domains.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from symphony_hf.data.embedded import embedded_corpus
from symphony_hf.errors import DataError

SCRIPT = 128
"""Tokens of a script: the characters of ASCII; the few others are `?`."""

VOCAB = 2 * SCRIPT
"""Tokens of code, then of prose."""

_CHARACTERS = 500_000
"""Maximum number of characters of a domain. Both have as many, and the last tenth is held out."""


class Domain(NamedTuple):
    """Tokens of one domain.

    Attributes:
        train: Training tokens. Shape: (tokens,).
        held_out: Tokens to measure on.
    """

    train: Tensor
    held_out: Tensor


def two_domains() -> dict[str, Domain]:
    """Return code and prose, with equal numbers of characters.

    Raises:
        DataError: If this Python has no sources, or not the texts of its `help`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(f"symphony balance: this Python has no prose to train on: {error}") from error
    texts = {
        "code": "\n".join(document.text for document in embedded_corpus().train),
        "prose": "\n".join(topics[name] for name in sorted(topics)),
    }
    length = min(_CHARACTERS, *map(len, texts.values()))
    return {name: _split(text[:length], first) for (name, text), first in zip(texts.items(), (0, SCRIPT), strict=True)}


def _split(text: str, first_token: int) -> Domain:
    tokens = first_token + torch.tensor(list(text.encode("ascii", "replace")))
    first = len(tokens) * 9 // 10
    return Domain(tokens[:first], tokens[first:])


def draw(tokens: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw rows from random places of a text. Shape: (rows, length)."""
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(length)]
