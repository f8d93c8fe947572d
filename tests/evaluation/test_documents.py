"""Documents that are long enough to evaluate on, with and without spaces between their words."""

import pytest

from symphony_hf.errors import DataError
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
    corpus = corpus_of(tmp_path, [text] * 12 + [heading] * 3)
    assert [document.text for document in corpus.documents] == [text] * 12


@pytest.mark.parametrize(("text", "lines"), [(CHINESE, 3), (ENGLISH, 5)])
def test_documents_are_shortened_to_about_as_many_words_in_any_script(tmp_path, text, lines):
    """25 characters in 75 bytes, and a line's end, are 12 words of 6 bytes; an English line has 7 words."""
    corpus = corpus_of(tmp_path, [f"{text}\n" * 20] * 10, words=30)
    assert [document.text.count("\n") for document in corpus.documents] == [lines] * 10


def test_an_attack_that_leaves_nothing_of_a_document_is_named(tmp_path):
    """A line of Chinese is one word to the attacks, and dropping it leaves no text to score."""
    with pytest.raises(DataError, match=r"word_drop at severity 5 leaves nothing of document '00.txt'"):
        corpus_of(tmp_path, [CHINESE] * 12, attacks=("word_drop",), severities=(5,))
