"""The engine of clean and attacked measurements, against scores computed by hand."""

import numpy as np
import pytest
from models import make_model

from symphony_hf.data.blocks import document_windows
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import DataError, SymphonyWarning
from symphony_hf.evaluation.attacks.word_swap import attack
from symphony_hf.evaluation.clean_attacked import (
    clean_and_attacked_windows,
    evaluate_documents,
    measure_forms,
    perplexity_levels,
)
from symphony_hf.evaluation.perplexity import DocumentScores, score_documents
from symphony_hf.recipe import EvalSection

DOCUMENTS = [Document(f"d{number}", f"harbour tower {number} lantern\nriver stone gate\n" * 3) for number in range(12)]
SECTION = EvalSection(attack_rate=0.5, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


def test_the_clean_form_is_scored_before_the_attacked_ones_in_order():
    seen = []
    measured = measure_forms(lambda form: seen.append(form) or str(form), ["b", "a"])
    assert seen == [None, "b", "a"]
    assert (measured.clean, measured.attacked) == ("None", {"b": "b", "a": "a"})


def test_levels_are_perplexities_and_their_ratio():
    scores = {
        None: DocumentScores(["d"], np.log([2.0]), np.array([1])),
        "x": DocumentScores(["d"], 3 * np.log([8.0]), np.array([3])),
    }
    levels = perplexity_levels(measure_forms(scores.get, ["x"]))
    assert levels == pytest.approx({"clean": 2, "attacked": 8, "ratio": 4})


def test_documents_are_evaluated_clean_and_under_the_word_swap(tokenizer):
    model = make_model("olmoe", vocab_size=len(tokenizer))
    found = evaluate_documents(model, tokenizer, DOCUMENTS, 16, SECTION)
    expected = {}
    for name, form in (("clean", DOCUMENTS), ("attacked", attack(DOCUMENTS, rate=0.5, seed=1))):
        cut = document_windows(form, tokenizer, 16)
        windows = {document.name: own for document, own in zip(form, cut, strict=True)}
        expected[name] = score_documents(model, windows).perplexity
    assert {name: found[name] for name in expected} == expected
    assert found["ratio"] == expected["attacked"] / expected["clean"] != 1
    assert found["documents"] == 12
    assert found["clean_low"] < found["clean"] < found["clean_high"]
    assert "clean_low" not in evaluate_documents(model, tokenizer, DOCUMENTS[:9], 16, SECTION)


def test_documents_too_short_for_a_prediction_are_left_out_of_both_forms(tokenizer):
    documents = [DOCUMENTS[0], Document("empty", ""), DOCUMENTS[1]]
    for windows in clean_and_attacked_windows(documents, tokenizer, 16, SECTION):
        assert list(windows) == ["d0", "d1"]


@pytest.mark.parametrize("context", [0, 8])
def test_text_without_spaces_is_evaluated_clean_alone(tokenizer, context):
    """It is the end of a training run, whose result must not be lost to an attack that has no words to replace."""
    chinese = [Document(f"d{number}", f"机器翻译的质量取决于数据和模型的规模{number}\n" * 3) for number in range(12)]
    model = make_model("olmoe", vocab_size=len(tokenizer))
    found = evaluate_documents(model, tokenizer, chinese, 16, EvalSection(context=context))
    assert found["clean_low"] < found["clean"] < found["clean_high"]
    assert not [name for name in found if name.startswith(("attacked", "ratio"))]
    assert found["note"].startswith("not attacked: no spaces separate the words")
    # No other attack can be chosen there.
    wanted = (
        "^the word swap needs words that are separated by spaces, and no spaces separate the words .*: give other text$"
    )
    with pytest.raises(DataError, match=wanted):
        clean_and_attacked_windows(chinese, tokenizer, 16, SECTION)


def test_documents_without_spaces_among_others_are_counted(tokenizer):
    chinese = [Document(f"c{number}", "机器翻译的质量取决于数据和模型的规模\n" * 3) for number in range(3)]
    wanted = "^the word swap: no spaces separate the words in 3 of 15 texts, so .* as one word: leave them out$"
    with pytest.warns(SymphonyWarning, match=wanted):
        clean_and_attacked_windows([*DOCUMENTS, *chinese], tokenizer, 16, SECTION)
