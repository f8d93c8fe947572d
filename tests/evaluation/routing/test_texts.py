"""Labels of tokens: their class, their distance from the last edit, and the domain of their document."""

import numpy as np
import pytest
from grammar import make_documents
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS, attack_documents
from symphony_hf.evaluation.routing.texts import CLASS_NAMES, DISTANCE_NAMES, _align, _classes, _domains
from symphony_hf.evaluation.windows import (
    Tokens,
    attacked_cuts,
    clean_cuts,
    covered_texts,
    find_untouched,
    tokenize,
)

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
    assert [CLASS_NAMES[index] for index in _classes(ids, tokenizer_of(model), None)] == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我们读书", {"word inside"}),
        ("книгу моря", {"word inside", "space"}),
        ("हिन्दी", {"word inside"}),  # letters, and marks on them
        ("。！", {"punctuation"}),
        ("\N{ARABIC-INDIC DIGIT FIVE}", {"number"}),
    ],
)
def test_parts_of_a_character_are_of_the_class_of_the_character(text, expected):
    """Bytes alone decode to a replacement character, which is no letter."""
    tokenizer = train_tokenizer([Document("a", "the old harbour of stone")], 280)
    documents = [Document("a", text)]
    (tokens,) = tokenize(documents, tokenizer)
    assert len(tokens.ids) >= len(text.replace(" ", "").encode())  # each byte is a token
    classes = _classes(tokens.ids, tokenizer, covered_texts(documents, tokenizer))
    assert {CLASS_NAMES[index] for index in classes} == expected


def naive_distances(before, after, block_size):
    """Walk back from each untouched token of a document to the last edit in its window, in either form."""
    untouched = find_untouched(before, after)
    cuts = clean_cuts(len(before.ids), block_size)
    ends = attacked_cuts(cuts, untouched, len(after.ids))
    pairs = list(zip(untouched.clean.tolist(), untouched.attacked.tolist(), strict=True))
    found = []
    for i, j in pairs:
        window = next(number for number, end in enumerate(cuts) if i < end)
        start, other_start = (0, 0) if window == 0 else (cuts[window - 1], ends[window - 1])
        a, b, steps = i, j, 1
        while (a, b) != (start, other_start) and a > start and b > other_start and (a - 1, b - 1) in pairs:
            a, b, steps = a - 1, b - 1, steps + 1
        has_edit = (a, b) != (start, other_start)
        same = before.ids[start:i] == after.ids[other_start:j]
        assert has_edit or same, "a token with another context has an edit before it"
        found.append(steps if has_edit else None)
    return found


def index_of(distance):
    if distance is None:
        return DISTANCE_NAMES.index("none before")
    return sum(distance >= least for least in (2, 4, 8, 16, 32))


@pytest.mark.parametrize("name", TEXT_ATTACKS)
@pytest.mark.parametrize("block_size", [6, 24])
def test_distances_are_those_of_a_walk_back_to_the_last_edit(name, block_size, words):
    documents = make_documents(6)
    attacked = attack_documents(documents, TEXT_ATTACKS[name], TEXT_ATTACKS[name].rate(5), 1)
    clean, other = tokenize(documents, words), tokenize(attacked, words)
    form = _align([document.name for document in documents], clean, other, block_size, first=1)
    expected = [
        index_of(distance)
        for before, after in zip(clean, other, strict=True)
        for distance in naive_distances(before, after, block_size)
    ]
    np.testing.assert_array_equal(form.distance, expected)


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ([1, 2, 3], ["1", "2-3", "2-3"]),  # the first token of the document is missing
        ([9, 0, 1, 2, 3], ["1", "2-3", "2-3", "4-7"]),  # another is inserted before it
        ([0, 1, 2, 3], ["none before"] * 4),
    ],
)
def test_an_edit_at_the_start_of_a_document_is_an_edit(ids, names):
    clean, attacked = (Tokens(own, np.zeros(len(own), int)) for own in ([0, 1, 2, 3], ids))
    form = _align(["a"], [clean], [attacked], block_size=8, first=7)
    assert [DISTANCE_NAMES[index] for index in form.distance] == names


def test_a_folder_of_the_name_of_the_others_is_one_of_them():
    names = [*[f"other/{n}.txt" for n in range(5)], *[f"big/{n}.txt" for n in range(5)], "small/0.txt"]
    domains, of_document = _domains(names, [100] * 10 + [1])
    assert sorted(domains) == ["big", "other"]
    assert [domains[index] for index in of_document] == ["other"] * 5 + ["big"] * 5 + ["other"]
