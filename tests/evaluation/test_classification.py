"""Accuracy of the most likely answer, against one forward pass per answer."""

import copy

import numpy as np
import pytest
import torch
from models import VOCAB, make_model

from symphony_hf.data.documents import Document
from symphony_hf.data.prepare import prepare_data
from symphony_hf.data.questions import Question
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import EvaluationError
from symphony_hf.evaluation.metrics import METRICS, compare_choices, metric_interval
from symphony_hf.evaluation.multiple_choice import ChoiceScores, score_choices
from symphony_hf.recipe import DataSection

ACCURACY = METRICS["accuracy"]


def questions(number=13, *, longest=3, choices=3, seed=0):
    """Prompts of all lengths, and answers of one token or several, some of which differ in the last one only."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    found = []
    for index in range(number):
        answers = [draw(1 + (index + choice) % longest) for choice in range(choices)]
        if index % 4 == 0:
            answers[1] = answers[0][:-1] + draw(1)
        found.append(Question(draw(3 + index % 7), answers, index % choices))
    return found


def naive_log_probs(model, question):
    """Each answer on its own, without padding or sharing."""
    scores = []
    for choice in question.choices:
        ids = torch.tensor([question.prompt + choice])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(question.prompt)
        scores.append(sum(float(log_probs[start - 1 + place, token]) for place, token in enumerate(choice)))
    return scores


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("longest", [1, 3])
def test_log_probabilities_are_those_of_each_answer_alone(batch_size, longest):
    model = make_model("olmoe").train()
    asked = questions(longest=longest)
    scores = score_choices(model, iter(asked), batch_size=batch_size)
    assert model.training
    model.eval()
    for question, found, chosen in zip(asked, scores.log_probs, scores.chosen, strict=True):
        expected = naive_log_probs(model, question)
        # float32 attention over padded rows: sums in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert chosen == np.argmax(expected)
    assert scores.answers.tolist() == [question.answer for question in asked]
    right = [chosen == question.answer for chosen, question in zip(scores.chosen, asked, strict=True)]
    assert (scores.chosen == scores.answers).tolist() == right
    assert scores.accuracy == np.mean(right)
    assert 0 < scores.accuracy < 1


def test_answers_of_one_token_are_read_off_one_row():
    """A forward a batch, of a row a question."""
    model = make_model("olmoe")
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    score_choices(model, questions(8, longest=1), batch_size=4)
    assert [shape[0] for shape in shapes] == [4, 4]


def test_a_forward_pass_has_no_more_rows_than_the_batch_size():
    model = make_model("olmoe")
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    score_choices(model, questions(8, longest=3, choices=9), batch_size=4)
    assert max(rows) == 4
    assert sum(rows) > 8


def test_the_tokenizers_side_of_padding_makes_no_difference():
    tokenizer = train_tokenizer([Document("a", "Does the sentence answer the question? yes no " * 20)], 300)
    model = make_model("olmoe", vocab_size=len(tokenizer))
    section = DataSection(kind="glue", name="qnli", path="embedded", limit=20)
    found = []
    for side in ("left", "right"):
        padding = copy.deepcopy(tokenizer)
        padding.padding_side = side
        asked = prepare_data(section, padding, seed=0).validation.questions()
        found.append(score_choices(model, asked, batch_size=7))
    assert found[0].chosen.tolist() == found[1].chosen.tolist()
    for one, other in zip(found[0].log_probs, found[1].log_probs, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.thorough
def test_training_on_questions_teaches_their_answers():
    """The trained answers are the measured ones."""
    tokenizer = train_tokenizer([Document("a", "Does the sentence answer the question? yes no " * 20)], 300)
    prepared = prepare_data(DataSection(kind="glue", name="qnli", path="embedded", limit=8), tokenizer, seed=0)
    model = make_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = prepared.collator([prepared.train[index] for index in range(8)])
    before = score_choices(model, prepared.train.questions())
    for _ in range(40):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = score_choices(model, prepared.train.questions())
    assert before.accuracy < after.accuracy == 1.0
    expected = -np.mean([scores[answer] for scores, answer in zip(after.log_probs, after.answers, strict=True)])
    np.testing.assert_allclose(model.eval()(**batch).loss.item(), expected, rtol=1e-3, atol=1e-4)


def scores_of(correct):
    correct = np.array(correct)
    scores = ChoiceScores(np.where(correct, 1, 0), np.ones(len(correct), dtype=int), [np.zeros(2)] * len(correct))
    return scores.choices


def test_intervals_are_paired_by_question():
    better = scores_of([True] * 45 + [False] * 5)
    worse = scores_of([True] * 25 + [False] * 25)
    assert metric_interval(ACCURACY, better).estimate == 0.9
    interval = compare_choices(ACCURACY, better, worse)
    assert interval.estimate == pytest.approx(0.4)
    assert interval.verdict(lower_is_better=False) == "better"
    same = compare_choices(ACCURACY, better, better)
    assert (same.low, same.estimate, same.high) == (0, 0, 0)


def test_what_cannot_be_scored_is_refused():
    model = make_model("olmoe")
    with pytest.raises(EvaluationError, match="no questions"):
        score_choices(model, [])
    with pytest.raises(EvaluationError, match="`batch_size` must be at least 1, got 0"):
        score_choices(model, questions(), batch_size=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match=r"question 0: the log-probabilities of its answers are .*not finite"):
        score_choices(model, questions())
    with pytest.raises(EvaluationError, match="different questions"):
        compare_choices(ACCURACY, scores_of([True] * 12), scores_of([True] * 13))
