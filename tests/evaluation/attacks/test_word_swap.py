"""The word-swap attack against a recount of every line."""

import random
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.word_swap import STOP_WORDS, attack, word_swap, words_changed

PROSE = (
    "The orchestra, which had rehearsed since dawn, played its symphony to an empty hall.\n"
    "\n"
    "  Nobody   came;\tand yet they played: 12 movements (each longer than the last)...\n"
    "of the and to\n"
    "= = = --- !\n"
    "Don’t stop\r\n"
    "end"
)


def naive_words(line):
    return [word for word in line.split() if any(character.isalnum() for character in word)]


def naive_is_stop_word(word):
    bare = word.lower().replace("’", "'")
    while bare and not bare[0].isalnum():
        bare = bare[1:]
    while bare and not bare[-1].isalnum():
        bare = bare[:-1]
    return bare in STOP_WORDS


def naive_wanted(line, rate, minimum):
    """Return the expected number of replaced words in a line."""
    words = naive_words(line)
    rounded = int((Decimal(str(rate)) * len(words)).quantize(Decimal(1), ROUND_HALF_UP))
    candidates = [word for word in words if not naive_is_stop_word(word)]
    return min(max(minimum, rounded), len(candidates))


def skeleton(text):
    """The whitespace of a text and where words are, but not what they are."""
    pieces, in_word = [], False
    for character in text:
        if character.isspace():
            pieces.append(character)
        elif not in_word:
            pieces.append("w")
        in_word = not character.isspace()
    return "".join(pieces)


@pytest.mark.parametrize("minimum", [0, 1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.015, 0.1, 0.35, 1.0])
def test_each_line_loses_as_many_words_as_it_should(embedded, rate, minimum):
    text = PROSE + "\n" + embedded.validation[0].text
    text += "\n" + " ".join(f"word{index}" for index in range(90)) + "\n" + "long line " * 50
    attacked = word_swap(text, rate=rate, minimum=minimum)
    for line, attacked_line in zip(text.split("\n"), attacked.split("\n"), strict=True):
        assert words_changed(line, attacked_line) == naive_wanted(line, rate, minimum)


@pytest.mark.parametrize(("num_words", "expected"), [(33, 0), (34, 1), (99, 1), (100, 2), (166, 2), (167, 3)])
def test_rate_is_rounded_half_up(num_words, expected):
    line = "noun " * num_words
    assert words_changed(line, word_swap(line, minimum=0)) == expected


def test_half_is_a_half_although_floats_fall_short_of_it():
    assert words_changed("noun " * 90, word_swap("noun " * 90, rate=0.35)) == 32  # 0.35 * 90 < 31.5 in floats


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
texts = st.lists(words | st.sampled_from(["the ", "And, ", "\n", "\t", " word", "\r\n", " "])).map("".join)

names = st.text(st.characters(), max_size=5)  # any, because file names may be


@given(text=texts, rate=st.floats(0, 1), minimum=st.integers(0, 4), seed=st.integers())
def test_only_content_words_are_replaced_and_whitespace_stays(text, rate, minimum, seed):
    attacked = word_swap(text, rate=rate, minimum=minimum, token="XQX", seed=seed)
    assert skeleton(attacked) == skeleton(text)
    for word, new in zip(text.split(), attacked.split(), strict=True):
        if new != word:
            assert new == "XQX"
            assert naive_words(word)
            assert not naive_is_stop_word(word)


@given(text=texts, rate=st.floats(0, 1), minimum=st.integers(0, 4), seed=st.integers(), name=names)
def test_same_seed_and_name_give_the_same_words(text, rate, minimum, seed, name):
    once, twice = (word_swap(text, rate=rate, minimum=minimum, seed=seed, name=name) for _ in range(2))
    assert once == twice


@given(text=texts, seed=st.integers())
def test_no_rate_and_no_minimum_change_nothing(text, seed):
    assert word_swap(text, rate=0, minimum=0, seed=seed) == text


def test_full_rate_leaves_stop_words_and_signs_only():
    attacked = word_swap(PROSE, rate=1.0)
    assert attacked.split("\n") == [
        "The AAA which had AAA AAA AAA AAA its AAA to an AAA AAA",
        "",
        "  AAA   AAA\tand yet they AAA AAA AAA (each AAA than the AAA",
        "of the and to",
        "= = = --- !",
        "Don’t AAA\r",
        "AAA",
    ]


def test_choice_is_even_over_the_content_words_of_a_line():
    line = "one the two of three four, and five"
    chosen = [word_swap(line, seed=seed).split().index("AAA") for seed in range(500)]
    counts = {index: chosen.count(index) for index in set(chosen)}
    assert counts.keys() == {0, 2, 4, 5, 7}
    assert all(60 < count < 140 for count in counts.values())


def test_seed_and_name_change_the_choice():
    line = " ".join(f"word{index}" for index in range(200))
    variants = {word_swap(line, rate=0.1, seed=seed, name=name) for seed in (0, 1) for name in ("a", "b", "1 a")}
    assert len(variants) == 6


def test_attack_does_not_depend_on_the_order_of_documents(embedded):
    documents = list(embedded.validation)
    attacked = attack(documents, seed=3)
    shuffled = documents[:]
    random.Random(0).shuffle(shuffled)
    assert {document.name: document for document in attack(shuffled, seed=3)} == {d.name: d for d in attacked}
    assert [document.name for document in attacked] == [document.name for document in documents]
    assert attack(documents[4:5], seed=3) == attacked[4:5]


def test_attack_is_word_swap_of_each_document_under_its_name():
    documents = [Document("first", PROSE), Document("second", PROSE)]
    options = {"rate": 0.3, "minimum": 2, "token": "BBB", "seed": 5}
    attacked = attack(documents, **options)
    assert [document.text for document in attacked] == [
        word_swap(PROSE, name=name, **options) for name in ("first", "second")
    ]
    assert attacked[0].text != attacked[1].text


def test_attack_is_the_same_in_every_version():
    attacked = word_swap("The orchestra played its symphony\nto an empty hall.", rate=0.3, seed=7, name="n")
    assert attacked == "The AAA played its AAA\nto an AAA hall."


@pytest.mark.parametrize("rate", [-0.01, 1.5, float("nan")])
def test_rate_out_of_range_is_refused(rate):
    with pytest.raises(ConfigError, match=f"rate .* between 0 and 1; got {rate}"):
        word_swap("some text", rate=rate)


def test_negative_minimum_is_refused():
    with pytest.raises(ConfigError, match=r"minimum .* 0 or more; got -1"):
        attack([Document("a", "some text")], minimum=-1)


@pytest.mark.parametrize("token", ["", "two words", " "])
def test_token_that_is_not_one_word_is_refused(token):
    with pytest.raises(ConfigError, match="token must be one word"):
        word_swap("some text", token=token)


def test_words_changed_counts_positions_not_sets():
    assert words_changed("a b\n c a", "a X\n c X") == 2
    assert words_changed("a b", "b a") == 2
    assert words_changed("", "") == 0


def test_words_changed_refuses_texts_that_do_not_line_up():
    with pytest.raises(DataError, match="got 2 and 3 words"):
        words_changed("a b", "a b c")


def test_stop_words_are_lower_case_words_without_outer_punctuation():
    assert {"the", "of", "and", "to", "don't"} <= STOP_WORDS
    assert {"didn", "t", "do", "n't", "he", "s"} <= STOP_WORDS  # "didn 't", "do n't", "he 's", as tokenized text has
    assert not {"orchestra", "played", "aaa"} & STOP_WORDS
    assert all(word == word.lower() and word[0].isalpha() and word[-1].isalpha() for word in STOP_WORDS)
