"""Damage: tokens replaced at random by tokens of the vocabulary, in test text and in training."""

import numpy as np
import torch
from torch import Tensor, nn

SPECIAL_TOKENS = 2
"""Number of tokens at the start of the vocabulary, `<eos>` and `<unk>`, that are neither replaced nor put in."""


def replace_at_random(stream: np.ndarray, rate: float, vocab_size: int, seed: int) -> np.ndarray:
    """Replace a share of a text's tokens.

    Args:
        stream: Tokens, int64. Shape: (tokens,).
        rate: Probability that a token is replaced, each independently.
        vocab_size: Number of tokens in the vocabulary, from which the replacements are drawn uniformly.
        seed: Seed. Of two rates with one seed, the higher one replaces what the lower one does, and more.

    Returns:
        The damaged text. Same shape. A replacement may by chance be the token itself, which then counts as left alone.
    """
    generator = np.random.default_rng(seed)
    is_replaced = (generator.random(len(stream)) < rate) & (stream >= SPECIAL_TOKENS)
    return np.where(is_replaced, generator.integers(SPECIAL_TOKENS, vocab_size, len(stream)), stream)


def reached_tokens(untouched_N: Tensor, block_size: int) -> Tensor:
    """Whether a token is left alone, and one before it in its row is not: others cannot change. Shape: (tokens,)."""
    rows = nn.functional.pad(~untouched_N, (0, -len(untouched_N) % block_size)).view(-1, block_size).int()
    return untouched_N & (rows.cumsum(1) - rows > 0).flatten()[: len(untouched_N)]


def damage_batch(ids: Tensor, rate: float, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace a share of a training batch's tokens, which are then not scored.

    Args:
        ids: Tokens. Shape: (rows, length).
        rate: Probability that a token is replaced.
        vocab_size: Number of tokens in the vocabulary.
        generator: Generator of the damage.

    Returns:
        Input, and labels with -100 where the input is not the text's token. Shape of each: (rows, length).
    """
    drawn = torch.randint(SPECIAL_TOKENS, vocab_size, ids.shape, generator=generator)
    is_replaced = (torch.rand(ids.shape, generator=generator) < rate) & (ids >= SPECIAL_TOKENS)
    damaged = torch.where(is_replaced, drawn, ids)
    return damaged, ids.masked_fill(damaged != ids, -100)
