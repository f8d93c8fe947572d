"""The alignment of clean and attacked token ids, on attacks whose untouched tokens are known."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_hf.evaluation import windows as alignment
from symphony_hf.evaluation.windows import aligned_positions

ids = st.lists(st.integers(0, 5), max_size=40)


def attack(clean, rate, seed):
    """Replace tokens by one to three tokens of -1; gives the attacked ids and where each untouched one went."""
    rng = random.Random(seed)
    attacked, untouched = [], []
    for position, token in enumerate(clean):
        if rng.random() < rate:
            attacked.extend([-1] * rng.choice([1, 2, 3]))
        else:
            untouched.append((position, len(attacked)))
            attacked.append(token)
    return attacked, np.array(untouched).T


def assert_alignment(clean, attacked, positions):
    clean_T, attacked_T = positions
    assert clean_T.shape == attacked_T.shape
    assert (np.diff(clean_T) > 0).all()
    assert (np.diff(attacked_T) > 0).all()
    assert [clean[i] for i in clean_T] == [attacked[j] for j in attacked_T]


def assert_mostly(positions, untouched):
    found, truth = (set(zip(*(side.tolist() for side in pairs), strict=True)) for pairs in (positions, untouched))
    assert len(found & truth) > 0.98 * len(truth)
    assert len(found - truth) < 0.02 * len(truth)


@given(clean=ids, attacked=ids)
def test_aligned_tokens_are_equal_and_in_order(clean, attacked):
    assert_alignment(clean, attacked, aligned_positions(clean, attacked))


@given(clean=ids)
def test_identical_texts_align_whole(clean):
    clean_T, attacked_T = aligned_positions(clean, clean)
    assert clean_T.tolist() == attacked_T.tolist() == list(range(len(clean)))


def test_a_small_text_by_hand():
    clean_T, attacked_T = aligned_positions([5, 6, 7, 8, 9], [5, 0, 0, 7, 8, 1])
    assert clean_T.tolist() == [0, 2, 3]
    assert attacked_T.tolist() == [0, 3, 4]


def test_distinct_tokens_find_exactly_the_untouched_ones():
    clean = list(range(300))
    attacked, untouched = attack(clean, rate=0.2, seed=0)
    np.testing.assert_array_equal(aligned_positions(clean, attacked), untouched)


@pytest.mark.parametrize("shrinks", [False, True])
def test_a_text_of_many_spans_aligns_like_a_short_one(monkeypatch, shrinks):
    """Frequent tokens and cut points may each cost a few pairs; the bulk must be the true ones."""
    clean = random.Random(1).choices(range(200), [1 / (rank + 3) for rank in range(200)], k=3000)
    attacked, untouched = attack(clean, rate=0.1, seed=2)
    if shrinks:
        clean, attacked, untouched = attacked, clean, untouched[::-1]
    monkeypatch.setattr(alignment, "SPAN", 256)
    positions = aligned_positions(clean, attacked)
    assert_alignment(clean, attacked, positions)
    assert_mostly(positions, untouched)


def test_a_text_of_frequent_tokens_alone_is_aligned():
    """Six types, each a sixth of the text: stop words to the extreme."""
    clean = random.Random(3).choices(range(6), k=600)
    attacked, untouched = attack(clean, rate=0.05, seed=4)
    assert_mostly(aligned_positions(clean, attacked), untouched)


def test_nothing_in_common_gives_no_positions():
    clean_T, attacked_T = aligned_positions([1, 2, 3], [4, 5])
    assert len(clean_T) == len(attacked_T) == 0
