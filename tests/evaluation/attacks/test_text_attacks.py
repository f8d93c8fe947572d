"""Attacks on text against recounts that share no code with them."""

import itertools
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.attacks.edits import HOMOGLYPHS, KEYBOARD
from symphony_hf.evaluation.attacks.text import SEVERITIES, TEXT_ATTACKS, attack_documents, find_text_attack

PROSE = (
    "The orchestra, which had rehearsed since dawn,\n"
    "    played its symphony to an   empty hall. \n"
    "\n"
    "Nobody came;\tand yet they played: 12 movements (each longer than the last)...\r\n"
    "end"
)
LETTERS = ("keyboard", "char_delete", "char_insert", "char_swap", "homoglyph")
BOARD = ["qwertyuiop", "asdfghjkl;", "zxcvbnm,./"]

PINNED = [
    "An empty hall of AAA",
    "An dmptg hall or noisd",
    "n emty hall o nois",
    "An emptky hall ofd noxisne",
    "An empty ahll of nosie",
    "An empty hаlӏ of nоise",
    "An empty hall of",
    "hall An empty of noise",
]

texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["the ", "\n", "\t", " word", " "])
).map("".join)


def wanted(rate, candidates):
    """A share of so many places, rounded half up, one at least."""
    rounded = int((Decimal(str(rate)) * candidates).quantize(Decimal(1), ROUND_HALF_UP))
    return min(candidates, max(1, rounded))


def num_letters(text, kind):
    if kind == "keyboard":
        return sum("a" <= letter.lower() <= "z" for letter in text if letter.isascii())
    if kind == "homoglyph":
        return sum(chr(code) in text[place] for place in range(len(text)) for code in HOMOGLYPHS)
    return sum(map(str.isalpha, text))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["keyboard", "homoglyph"])
def test_replaced_letters_are_as_many_as_the_rate_says(name, severity):
    attack = TEXT_ATTACKS[name]
    attacked = attack(PROSE * 5, attack.rates[severity - 1], seed=3)
    changed = [(old, new) for old, new in zip(PROSE * 5, attacked, strict=True) if old != new]
    assert len(changed) == wanted(attack.rates[severity - 1], num_letters(PROSE * 5, name))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_missing_and_surplus_letters_are_as_many_as_the_rate_says(severity):
    text = PROSE * 5
    number = wanted(TEXT_ATTACKS["char_delete"].rates[severity - 1], num_letters(text, "any"))
    for name, sign in (("char_delete", -1), ("char_insert", 1)):
        attacked = TEXT_ATTACKS[name](text, TEXT_ATTACKS[name].rates[severity - 1])
        assert len(attacked) - len(text) == sign * number
        longer, shorter = Counter(max(text, attacked, key=len)), Counter(min(text, attacked, key=len))
        assert not shorter - longer  # nothing else has come or gone
        assert all(letter.isalpha() for letter in longer - shorter)


def test_typed_letters_are_next_to_the_right_ones():
    attacked = TEXT_ATTACKS["keyboard"](PROSE * 20, 0.5)
    typed = [(old, new) for old, new in zip(PROSE * 20, attacked, strict=True) if old != new]
    assert typed
    for old, new in typed:
        assert old.isupper() == new.isupper()
        (row, column), (other_row, other_column) = (place_on_board(letter) for letter in (old, new))
        assert abs(row - other_row) <= 1
        assert abs(column - other_column) <= 1


def place_on_board(letter):
    return next((row, keys.index(letter.lower())) for row, keys in enumerate(BOARD) if letter.lower() in keys)


def test_the_neighbours_of_keys_known_by_heart():
    known = {"s": "weadzx", "q": "wa", "p": "ol", "m": "njk", "g": "tyfhvb", "a": "qwsz"}
    assert {key: set(KEYBOARD[key]) for key in known} == {key: set(near) for key, near in known.items()}
    assert all(key in KEYBOARD[other] for key, near in KEYBOARD.items() for other in near)


def test_look_alikes_are_cyrillic_and_of_the_same_case():
    for latin, cyrillic in HOMOGLYPHS.items():
        assert unicodedata.name(chr(latin)).startswith("LATIN")
        assert unicodedata.name(chr(cyrillic)).startswith("CYRILLIC")
        assert chr(latin).isupper() == chr(cyrillic).isupper()
    assert len(set(HOMOGLYPHS.values())) == len(HOMOGLYPHS)


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_swapped_letters_are_pairs_of_neighbours(rate):
    text = PROSE * 5
    attacked = TEXT_ATTACKS["char_swap"](text, rate)
    place, swaps = 0, 0
    while place < len(text):
        if text[place] == attacked[place]:
            place += 1
            continue
        assert attacked[place : place + 2] == text[place + 1] + text[place]
        assert text[place : place + 2].isalpha()
        place, swaps = place + 2, swaps + 1
    pairs = sum(a.isalpha() and b.isalpha() and a != b for a, b in itertools.pairwise(text))
    assert swaps == wanted(rate, pairs)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_dropped_words_are_as_many_as_the_rate_says_and_the_others_keep_their_order(severity):
    attack = TEXT_ATTACKS["word_drop"]
    text = "\n".join(" ".join(f"w{line}.{place}" for place in range(7)) for line in range(9))
    attacked = attack(text, attack.rate(severity))
    kept = attacked.split()
    assert 63 - len(kept) == wanted(attack.rate(severity), 63)
    assert [word for word in text.split() if word in set(kept)] == kept
    assert "  " not in attacked
    assert not any(line != line.strip() for line in attacked.split("\n"))


def test_a_line_that_loses_words_keeps_its_indentation_and_its_end():
    assert TEXT_ATTACKS["word_drop"]("    return one of  two\n", 1.0) == "    \n"
    lines = {TEXT_ATTACKS["word_drop"]("    a  b\tc \n", 0.3, seed=seed) for seed in range(30)}
    assert lines == {"    b\tc \n", "    a\tc \n", "    a  b \n"}


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shuffled_words_stay_within_their_run_of_three(severity):
    attack = TEXT_ATTACKS["word_shuffle"]
    lines = [[f"w{line}.{place}" for place in range(10)] for line in range(9)]  # runs of 3, 3, 3; one is left over
    attacked = attack("\n".join(map(" ".join, lines)), attack.rate(severity)).split("\n")
    moved = 0
    for before, after in zip(lines, map(str.split, attacked), strict=True):
        assert before[9] == after[9]
        for start in range(0, 9, 3):
            old, new = before[start : start + 3], after[start : start + 3]
            assert sorted(old) == sorted(new)
            assert old == new or all(a != b for a, b in zip(old, new, strict=True))
            moved += old != new
    assert moved == wanted(attack.rate(severity), 27)


@pytest.mark.parametrize("name", TEXT_ATTACKS)
@given(text=texts, rate=st.floats(0, 1), seed=st.integers(), document=st.text(max_size=4))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_lines_stay_and_the_same_seed_and_name_give_the_same_text(name, text, rate, seed, document):
    once, twice = (TEXT_ATTACKS[name](text, rate, seed=seed, name=document) for _ in range(2))
    assert once == twice
    assert once.count("\n") == text.count("\n")


@pytest.mark.parametrize("name", TEXT_ATTACKS)
def test_every_severity_changes_the_text_and_more_than_the_one_before(name):
    text = PROSE * 20
    attacked = [TEXT_ATTACKS[name](text, TEXT_ATTACKS[name].rate(severity), seed=1) for severity in SEVERITIES]
    kept = [len(untouched(text, other)) for other in attacked]
    assert kept[0] < len(text.split())
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0]


def untouched(text, attacked):
    """Words at the same place from the front or, in lines that lost some, that are there at all."""
    same = []
    for line, other in zip(text.split("\n"), attacked.split("\n"), strict=True):
        before, after = line.split(), other.split()
        if len(before) == len(after):
            same += [word for word, new in zip(before, after, strict=True) if word == new]
        else:
            same += (Counter(before) & Counter(after)).elements()
    return same


@pytest.mark.parametrize("name", ["keyboard", "homoglyph"])
def test_what_a_low_severity_changes_a_high_one_changes_too(name):
    attack = TEXT_ATTACKS[name]
    attacked = [attack(PROSE, attack.rate(severity)) for severity in SEVERITIES]
    for less, more in itertools.pairwise(attacked):
        assert all(new == more[place] for place, new in enumerate(less) if new != PROSE[place])


@pytest.mark.parametrize("name", TEXT_ATTACKS)
def test_seed_and_name_change_the_positions(name):
    results = {TEXT_ATTACKS[name](PROSE * 4, 0.2, seed=seed, name=which) for seed in (0, 1) for which in ("a", "b")}
    assert len(results) == 4


def test_attacks_change_different_positions():
    """Were all seeded alike, a missing and a mistyped letter would be the same one."""
    text = "abcdefgh" * 40
    typed = TEXT_ATTACKS["keyboard"](text, 0.05)
    alike = TEXT_ATTACKS["homoglyph"](text, 0.05)
    places = [{place for place, new in enumerate(other) if new != text[place]} for other in (typed, alike)]
    assert places[0] != places[1]
    assert len(places[0] & places[1]) < 8


@pytest.mark.parametrize("name", TEXT_ATTACKS)
def test_a_text_without_words_stays_as_it_is(name):
    for text in ("", "\n \n", "1 2 3" if name in LETTERS else ""):
        assert TEXT_ATTACKS[name](text, 1.0) == text


def test_documents_are_attacked_under_their_names():
    attack = TEXT_ATTACKS["keyboard"]
    documents = [Document("first", PROSE), Document("second", PROSE)]
    attacked = attack_documents(documents, attack, 0.1, 4)
    assert [document.text for document in attacked] == [attack(PROSE, 0.1, seed=4, name=n) for n in ("first", "second")]
    assert attack_documents(documents[1:], attack, 0.1, 4) == attacked[1:]


@pytest.mark.thorough
def test_attacks_are_the_same_in_every_process_and_version():
    program = (
        "import sys; from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS; "
        "texts = ('An empty hall of noise', sys.stdin.buffer.read().decode()); "
        "sys.stdout.buffer.write('|'.join(a(text, .2, seed=7, name='n') "
        "for text in texts for a in TEXT_ATTACKS.values()).encode())"
    )
    other_hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        input=PROSE.encode(),
        env=os.environ | {"PYTHONHASHSEED": other_hash_seed},
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        check=True,
    )
    attacked = [attack(PROSE, 0.2, seed=7, name="n") for attack in TEXT_ATTACKS.values()]
    assert finished.stdout.decode().split("|") == PINNED + attacked


def test_an_unknown_attack_or_severity_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'keybord'; did you mean `keyboard`"):
        find_text_attack("keybord")
    with pytest.raises(ConfigError, match="severity must be 1, 2, 3, 4 or 5; got 6"):
        TEXT_ATTACKS["aaa"].rate(6)
    with pytest.raises(ConfigError, match=r"`rate` is a share .* got 1.5"):
        TEXT_ATTACKS["char_swap"](PROSE, 1.5)
