"""Questions with a choice of answers, in tokens."""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from symphony_hf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Question(NamedTuple):
    """Prompt and the answers to choose from.

    Attributes:
        prompt: Token ids that precede every answer.
        choices: Token ids of each answer, at least one. No answer is a prefix of another.
        answer: Index of the right answer.
        pixel_values: Images of the prompt. Shape: (images, channels, height, width).
    """

    prompt: list[int]
    choices: list[list[int]]
    answer: int
    pixel_values: Tensor | None = None


def tokenize_choices(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[list[int]]]:
    """Tokenize texts, the prompt followed by each answer, and split the common beginning from the rest of each.

    Whole texts are tokenized because a token may cross the end of the prompt. Raises DataError if the tokens of one
    text are a prefix of another's.
    """
    token_ids = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return split_shared(token_ids, texts)


def split_shared(token_ids: Sequence[list[int]], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Split the common prefix of two or more sequences of token ids from the rest of each.

    Raises DataError, with the text, if one sequence is a prefix of another.
    """
    length = common_length(*token_ids)
    for ids, text in zip(token_ids, texts, strict=True):
        if len(ids) == length:
            raise DataError(
                f"the answers cannot be told apart by this tokenizer: all tokens of {text[-40:]!r} begin another's"
            )
    return token_ids[0][:length], [ids[length:] for ids in token_ids]


def common_length(*token_ids: Sequence[int]) -> int:
    """Return the length of the common prefix of sequences of token ids."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*token_ids, strict=False)))
