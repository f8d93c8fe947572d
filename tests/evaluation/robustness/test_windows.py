"""Windows of a document and of its attacked form: at the same words, and nothing lost."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError, EvaluationError
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS, attack_documents
from symphony_hf.evaluation.windows import (
    Tokens,
    Untouched,
    attacked_cuts,
    check_context,
    clean_cuts,
    cut,
    cut_attacked,
    find_untouched,
    first_token,
    longest_attacked,
    tokenize,
)


def joined(windows, first):
    """The tokens of all windows, the given one at the front of each taken off."""
    assert all(window[0] == first for window in windows)
    return torch.cat([window[1:] for window in windows]).tolist()


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "under_attack", "advice"),
    [
        (65, 65, False, "set --block_size to 64 or less"),
        (128, 68, True, "set --block_size to about 34 or less, so that the same words fit under attack"),
        (128, 4, True, "set --block_size to about 2 or less, so that the same words fit under attack"),
        (129, 4, True, "the model's context is too short for this attack, so use another one"),
    ],
)
def test_a_window_that_is_too_long_is_refused_with_a_size_that_exists(num_tokens, block_size, under_attack, advice):
    model = SimpleNamespace(source="model", max_tokens=64)
    with pytest.raises(
        ConfigError, match=rf"^eval: it: a window has {num_tokens} tokens, and `model` takes 64: {advice}$"
    ):
        check_context("eval", "it", num_tokens, block_size, model, under_attack=under_attack)
    check_context("eval", "it", 64, block_size, model, under_attack=under_attack)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 30, 31, 100])
def test_clean_windows_are_full_but_the_last_and_lose_nothing(num_tokens):
    ids = list(range(100, 100 + num_tokens))
    windows = cut(ids, clean_cuts(num_tokens, 16), first=7)
    assert joined(windows, 7) == ids
    assert [len(window) for window in windows[:-1]] == [16] * (len(windows) - 1)
    assert 2 <= len(windows[-1]) <= 16


@pytest.mark.parametrize("name", TEXT_ATTACKS)
def test_attacked_windows_lose_nothing_and_keep_to_the_words_of_the_clean_ones(name, documents, tokenizer):
    attacked = attack_documents(documents, TEXT_ATTACKS[name], TEXT_ATTACKS[name].rate(5), 0)
    for before, after in zip(tokenize(documents, tokenizer), tokenize(attacked, tokenizer), strict=True):
        untouched = find_untouched(before, after)
        (windows,) = cut_attacked([before], [after], [untouched], 16, first=0)
        assert longest_attacked([before], [after], [untouched], 16) == max(map(len, windows))
        cuts = clean_cuts(len(before.ids), 16)
        ends = attacked_cuts(cuts, untouched, len(after.ids))
        assert joined(cut(after.ids, ends, 0), 0) == after.ids
        # An untouched token is in the window of the same number in both forms.
        window = np.searchsorted(cuts, untouched.clean, side="right")
        np.testing.assert_array_equal(window, np.searchsorted(ends, untouched.attacked, side="right"))


def test_cuts_between_untouched_tokens_are_in_proportion():
    untouched = Untouched(np.array([0, 10]), np.array([0, 30]))
    np.testing.assert_array_equal(attacked_cuts(np.array([5, 10, 12]), untouched, 34), [14, 30, 34])
    nothing = Untouched(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    np.testing.assert_array_equal(attacked_cuts(np.array([5, 10]), nothing, 40), [20, 40])


def test_untouched_tokens_are_the_words_that_were_not_replaced(documents, word_tokenizer):
    attacked = attack_documents(documents, TEXT_ATTACKS["aaa"], 0.3, 0)
    for document, other, before, after in zip(
        documents, attacked, tokenize(documents, word_tokenizer), tokenize(attacked, word_tokenizer), strict=True
    ):
        words, new = document.text.split(), other.text.split()
        same = [place for place, word in enumerate(words) if word == new[place]]
        untouched = find_untouched(before, after)
        np.testing.assert_array_equal(untouched.clean, same)
        np.testing.assert_array_equal(untouched.attacked, same)
        assert 0 < len(same) < len(words)


def test_unknown_words_are_untouched_if_their_text_is_the_same(word_tokenizer):
    before, after = tokenize([Document("a", "qwer the asdf old"), Document("b", "qwer the sadf old")], word_tokenizer)
    assert before.ids == after.ids
    assert find_untouched(before, after).clean.tolist() == [0, 1, 3]
    assert find_untouched(before, after).attacked.tolist() == [0, 1, 3]


def test_untouched_tokens_are_the_same_and_in_order_and_in_their_line(documents, tokenizer):
    for attack in TEXT_ATTACKS.values():
        attacked = attack_documents(documents, attack, attack.rate(4), 2)
        for before, after in zip(tokenize(documents, tokenizer), tokenize(attacked, tokenizer), strict=True):
            clean, other = find_untouched(before, after)
            assert [before.ids[place] for place in clean] == [after.ids[place] for place in other]
            assert (np.diff(clean) > 0).all()
            assert (np.diff(other) > 0).all()
            np.testing.assert_array_equal(before.lines[clean], after.lines[other])
            assert len(clean) > 0.3 * len(before.ids)


def test_lines_are_those_that_tokens_begin_in(word_tokenizer):
    (tokens,) = tokenize([Document("a", "the old\n\nharbour\ntower .")], word_tokenizer)
    assert tokens.lines.tolist() == [0, 0, 2, 3, 3]


def test_a_tokenizer_without_offsets_has_one_line():
    class Slow:
        is_fast, unk_token_id = False, ord("?")

        def __call__(self, texts, **options):
            assert not options["return_offsets_mapping"]
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    before, after = tokenize([Document("a", "ab\ncd"), Document("b", "ab\nxd")], Slow())
    assert before.lines.tolist() == [0] * 5
    assert find_untouched(before, after).clean.tolist() == [0, 1, 2, 4]
    before, after = tokenize([Document("a", "a?c"), Document("b", "a?c")], Slow())
    assert find_untouched(before, after).clean.tolist() == [0, 2]  # it may be another unknown word


def test_equal_forms_are_untouched_as_wholes():
    tokens = Tokens([5, 5, 6, 7], np.array([0, 0, 1, 4]))
    assert find_untouched(tokens, tokens).clean.tolist() == [0, 1, 2, 3]


def test_without_tokens_or_a_first_one_there_is_nothing_to_score(tokenizer, word_tokenizer):
    assert first_token(tokenizer) == tokenizer.bos_token_id
    assert first_token(word_tokenizer) == word_tokenizer.eos_token_id
    with pytest.raises(EvaluationError, match="'blank' has no tokens"):
        tokenize([Document("blank", " \n")], word_tokenizer)
    word_tokenizer.eos_token = None
    try:
        with pytest.raises(ConfigError, match="set its `bos_token`"):
            first_token(word_tokenizer)
    finally:
        word_tokenizer.eos_token = "<eos>"
