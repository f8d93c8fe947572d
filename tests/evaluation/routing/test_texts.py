"""Classes of tokens, for tokenizers that mark where words begin, that mark their insides, and that mark nothing."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from symphony_hf.evaluation.routing.texts import CLASS_NAMES, _classes

WORDS = {"hello": 0, "world": 1, "12": 2, ".": 3, "[UNK]": 4}
PIECES = {"hel": 0, "##lo": 1, "world": 2, ".": 3, "[UNK]": 4}
BYTES = {"\u0120hello": 0, "wor": 1, "\u0120wor": 2, "ld": 3, ".": 4}


def tokenizer_of(model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("model", "ids", "names"),
    [
        (
            models.WordLevel(WORDS, unk_token="[UNK]"),
            [0, 1, 2, 3],
            ["word start", "word start", "number", "punctuation"],
        ),
        (
            models.WordPiece(PIECES, unk_token="[UNK]"),
            [0, 1, 2, 3],
            ["word start", "word inside", "word start", "punctuation"],
        ),
        (models.BPE(BYTES, []), [0, 2, 3, 4], ["word start", "word start", "word inside", "punctuation"]),
    ],
    ids=["words", "pieces", "bytes"],
)
def test_words_begin_where_the_tokenizer_says(model, ids, names):
    assert [CLASS_NAMES[index] for index in _classes(ids, tokenizer_of(model))] == names
