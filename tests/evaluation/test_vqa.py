"""Questions about images: chosen answers, against the model asked by hand; and what counts as a right free one."""

import datasets
import numpy as np
import pytest
import torch
from visual import TOKENS_PER_IMAGE, entry, make_model, make_processor, write_llava

from symphony_hf.data.documents import Document
from symphony_hf.data.images.questions import VisualQuestions
from symphony_hf.data.prepare import prepare_data
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import DataError
from symphony_hf.evaluation.generation import AnswerScores
from symphony_hf.evaluation.multiple_choice import score_choices
from symphony_hf.recipe import DataSection

DIGITS = [f"The digit is {digit}." for digit in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer([Document("a", "Which digit is shown? The digit is 7. " * 9)], 300))


@pytest.fixture
def digits(processor):
    return prepare_data(DataSection(kind="llava", limit=12), processor, seed=0)


@pytest.fixture
def model(processor):
    return make_model(processor)


def by_hand(questions, number):
    """Rendered text and pixels of one question, by the processor itself."""
    row = questions.rows[number]
    text = questions.collator.processor.tokenizer.apply_chat_template(
        row["messages"][:1], tokenize=False, add_generation_prompt=True
    )
    pixels = questions.collator.pixels(row["images"])
    ids = questions.collator.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    place = ids.index(questions.collator.image_id)
    ids[place : place + 1] = [questions.collator.image_id] * TOKENS_PER_IMAGE
    return torch.tensor([ids]), pixels, row["messages"][1]["content"]


@pytest.mark.thorough
def test_chosen_answers_are_the_most_likely(digits, model):
    questions = VisualQuestions(digits.test, digits.collator)
    scores = score_choices(model, questions.choices(DIGITS), batch_size=5)
    assert len(scores.chosen) == len(questions) == 12
    assert questions.answers() == [DIGITS[answer] for answer in scores.answers]
    for number in range(12):
        ids, pixels, answer = by_hand(questions, number)
        assert DIGITS[scores.answers[number]] == answer
        trained = digits.collator([digits.test[number]])
        assert torch.equal(trained["pixel_values"], pixels)
        expected = []
        for choice in DIGITS:
            text = f" {choice}<|endoftext|>"
            tokens = questions.collator.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
            assert torch.equal(trained["input_ids"], whole) == (choice == answer)
            with torch.no_grad():
                log_probs = model(input_ids=whole, pixel_values=pixels).logits[0].log_softmax(-1)
            start = ids.shape[1]
            expected.append(sum(float(log_probs[start - 1 + place, t]) for place, t in enumerate(tokens)))
        # The tokens that all answers share are in the prompt, not in the scores: the differences are the same.
        # float32 sums over padded rows, in another order.
        found = scores.log_probs[number]
        np.testing.assert_allclose(found - found[0], np.array(expected) - expected[0], rtol=1e-3, atol=1e-3)


def test_questions_of_all_lengths_and_numbers_of_images_are_asked_together(tmp_path, processor, model):
    entries = [entry(number, images=number % 3, turns=1 + number % 2) for number in range(6)]
    entries[4]["conversations"][0]["value"] += " And what else, in some more words?"
    data = prepare_data(DataSection(kind="llava", path=str(write_llava(tmp_path, entries))), processor, seed=0)
    questions = VisualQuestions(data.train, data.collator)
    answers = [f"Answer {number} of turn 0." for number in range(6)]
    asked = list(questions.choices(answers))
    assert [0 if one.pixel_values is None else len(one.pixel_values) for one in asked] == [0, 1, 2] * 2
    together, alone = (score_choices(model, asked, batch_size=batch_size) for batch_size in (6, 1))
    assert together.answers.tolist() == alone.answers.tolist() == list(range(6))
    # float32 sums over padded rows, in another order.
    for found, expected in zip(together.log_probs, alone.log_probs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_answers_agree_but_for_case_spaces_and_punctuation():
    scores = AnswerScores([" the digit is 7", "No!", "8", " ?"], ["The digit is 7.", "no", "9", "?"])
    assert scores.correct.tolist() == [1, 1, 0, 1]
    assert scores.accuracy == 0.75


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("是。", "是"),
        ("“Cat”", "cat"),
        ("¿Sí?", "sí"),
        ("caf\u00e9", "cafe\u0301"),
        ("(5)", "5"),
        ("-5.", "\N{MINUS SIGN}5"),
        ("\N{EN DASH}5", "-5"),
        ("-.5", "\N{EN DASH}.5"),
        ("+5", "5"),
        ("+.5", ".5"),
        ("...5", "5"),
        (". . .5", "5"),
        ("...-5", "-5"),
        ("A\u0007.", "a"),
    ],
)
def test_answers_agree_in_any_script(given, answer):
    assert AnswerScores([given], [answer]).correct.tolist() == [1]


@pytest.mark.parametrize(
    ("given", "answer"),
    [("-", "+"), ("", "?"), ("5", "-5"), ("5", ".5"), ("-5", "-.5"), ("", "是"), ("5", "\N{EN DASH}5")],
)
def test_signs_and_punctuation_alone_are_answers(given, answer):
    assert AnswerScores([given], [answer]).correct.tolist() == [0]


def test_a_right_answer_that_cannot_be_chosen_is_refused(digits):
    questions = VisualQuestions(digits.test, digits.collator)
    with pytest.raises(DataError, match=r"the right answer, 'The digit is \d\.', is none of the 2 given"):
        list(questions.choices(["yes", "no"]))
