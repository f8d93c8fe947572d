"""Documents that are long enough to evaluate on, with and without spaces between their words."""

import pytest

from symphony_hf.errors import DataError, SymphonyWarning
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS
from symphony_hf.evaluation.documents import prepare_corpus
from symphony_hf.evaluation.routing.settings import RoutingSettings

CHINESE = "机器翻译的质量取决于数据和模型的规模以及训练的方法"
ENGLISH = "the old harbour has a tower ."


def corpus_of(folder, texts, words=None, **settings):
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return prepare_corpus(RoutingSettings(model="none", data=str(folder), split="all", **settings), words)


@pytest.mark.parametrize("text", [CHINESE, ENGLISH])
def test_headings_are_left_out_in_any_script(tmp_path, text):
    heading = "数据" if text is CHINESE else "the old harbour"
    corpus = corpus_of(tmp_path, [text] * 12 + [heading] * 3, attacks=())
    assert [document.text for document in corpus.documents] == [text] * 12


@pytest.mark.parametrize(("text", "lines"), [(CHINESE, 3), (ENGLISH, 5)])
def test_documents_are_shortened_to_about_as_many_words_in_any_script(tmp_path, text, lines):
    """25 characters in 75 bytes, and a line's end, are 12 words of 6 bytes; an English line has 7 words."""
    corpus = corpus_of(tmp_path, [f"{text}\n" * 20] * 10, words=30, attacks=())
    assert [document.text.count("\n") for document in corpus.documents] == [lines] * 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHINESE * 40, (CHINESE * 40)[:60]),  # 30 words of 6 bytes, in characters of 3
        (f"{ENGLISH} " * 40, " ".join([ENGLISH] * 4 + ["the old"])),
        (f"{ENGLISH}\n" + f"{ENGLISH} " * 40 + "\nend", f"{ENGLISH}\n" + " ".join([ENGLISH] * 3 + ["the old"])),
        (f"{ENGLISH} " * 4, f"{ENGLISH} " * 4),
    ],
    ids=["Chinese", "one line", "a short line before", "as short as it is"],
)
def test_a_line_that_is_longer_than_that_is_cut(tmp_path, text, expected):
    """A table has each document in one line."""
    corpus = corpus_of(tmp_path, [text] * 10, words=30, attacks=())
    assert [document.text for document in corpus.documents] == [expected] * 10


@pytest.mark.parametrize("name", TEXT_ATTACKS)
def test_an_attack_on_words_needs_spaces_between_them(tmp_path, name):
    """A line of Chinese would be one word, and AAA all that is left of it."""
    if name in ("aaa", "word_drop", "word_shuffle"):
        with pytest.raises(DataError, match=f"{name} changes words, and no spaces separate .* such as char_swap"):
            corpus_of(tmp_path, [f"{CHINESE}\n" * 4] * 12, attacks=(name,))
    elif name not in ("keyboard", "homoglyph"):  # which are of Latin letters
        corpus = corpus_of(tmp_path, [f"{CHINESE}\n" * 4] * 12, attacks=(name,), severities=(5,))
        (attacked,) = corpus.attacked.values()
        assert all(len(document.text) > 60 for document in attacked)


def test_short_lines_do_not_pass_for_words(tmp_path):
    """Lines of ten Chinese characters have fewer bytes than a long word."""
    with pytest.raises(DataError, match="aaa changes words, and no spaces separate"):
        corpus_of(tmp_path, [f"{CHINESE[:10]}\n" * 12] * 12)


def test_documents_without_spaces_among_others_are_counted(tmp_path):
    texts = [f"{ENGLISH}\n" * 4] * 9 + [CHINESE] * 3
    with pytest.warns(SymphonyWarning, match=r"no spaces separate the words in 3 of 12 texts, so aaa counts each"):
        corpus_of(tmp_path, texts, severities=(1, 5))


def test_an_attack_that_leaves_nothing_of_a_document_is_named(tmp_path):
    """A line of Chinese is one word to the attacks, and dropping it leaves no text to score."""
    texts = [CHINESE] + [f"{ENGLISH}\n" * 4] * 11
    with (
        pytest.warns(SymphonyWarning, match="1 of 12 texts"),
        pytest.raises(DataError, match=r"word_drop at severity 5 leaves nothing of document '00.txt'"),
    ):
        corpus_of(tmp_path, texts, attacks=("word_drop",), severities=(5,))
