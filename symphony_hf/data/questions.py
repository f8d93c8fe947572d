"""A question with a choice of answers, in tokens: what a model is trained on and measured by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from symphony_hf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Question(NamedTuple):
    """A prompt, and the answers to choose from.

    Attributes:
        prompt: Token ids that all answers have in front of them.
        choices: Token ids of each answer, one at least; no choice is the beginning of another.
        answer: The number of the right one.
        pixel_values: Of the prompt's images. Shape: (images, channels, height, width).
    """

    prompt: list[int]
    choices: list[list[int]]
    answer: int
    pixel_values: Tensor | None = None


def tokenize_choices(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[list[int]]]:
    """Tokenize whole texts that begin alike, and tell what they share from what they do not.

    Whole texts, because tokens may reach across the end of a prompt.

    Args:
        texts: The prompt with each answer after it.
        tokenizer: The model's. It adds the special tokens that it adds to any text.

    Returns:
        The shared token ids, and the others of each text.

    Raises:
        DataError: If the tokens of one text are the beginning of another's.
    """
    token_ids = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return split_shared(token_ids, texts)


def split_shared(token_ids: Sequence[list[int]], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """What sequences of token ids share at their beginning, and the rest of each.

    Args:
        token_ids: One sequence for each of two or more texts.
        texts: For the error message.

    Raises:
        DataError: If one sequence is the beginning of another.
    """
    length = 0
    while all(len(ids) > length and ids[length] == token_ids[0][length] for ids in token_ids):
        length += 1
    for ids, text in zip(token_ids, texts, strict=True):
        if len(ids) == length:
            raise DataError(
                f"the answers cannot be told apart by this tokenizer: all tokens of {text[-40:]!r} begin another's"
            )
    return token_ids[0][:length], [ids[length:] for ids in token_ids]
