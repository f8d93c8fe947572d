"""`symphony eval --task classification`: accuracies against loops over single questions, verdicts, and refusals."""

import json
import random
import shutil
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from grammar import NOUNS, VERBS, save
from models import make_model
from rich.console import Console
from sklearn.metrics import f1_score
from typer.testing import CliRunner

import symphony_hf.evaluation.robustness.questions as classification
from symphony_hf.cli import app
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS
from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness
from symphony_hf.evaluation.robustness.settings import RobustnessSettings
from symphony_hf.evaluation.robustness.tables import print_robustness

NUMBER = 24
PROMPT = "Review: {}\nIs the review negative or positive?\nAnswer:"  # of sst2
ANSWERS = ("negative", "positive")


def reviews(number=NUMBER, seed=0):
    """Sentences, and whether they have a good word or a bad one in them."""
    rng = random.Random(seed)
    rows = []
    for place in range(number):
        label = place % 2
        word = ("dreadful", "splendid")[label]
        rows.append({"sentence": f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} a {word} {rng.choice(NOUNS)}"})
        rows[-1]["label"] = label
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def review_tokenizer():
    return train_tokenizer([Document("a", "\n".join(PROMPT.format(row["sentence"]) for row in reviews()))], 400)


def sequence(tokenizer, sentence, answer):
    return tokenizer(f"{PROMPT.format(sentence)} {answer}")["input_ids"]


@pytest.fixture(scope="module")
def models(review_tokenizer, tmp_path_factory):
    """One that has learned the word that counts, and one that has not. Folders."""
    paths = {}
    for name, steps in (("trained", 40), ("untrained", 0)):
        model = make_model("olmoe", vocab_size=len(review_tokenizer), max_position_embeddings=256)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        rows = [(row["sentence"], ANSWERS[row["label"]]) for row in reviews(60, seed=1)]
        for step in range(steps):
            ids = [torch.tensor(sequence(review_tokenizer, *row)) for row in rows[step % 3 * 20 :][:20]]
            batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            labels = torch.full_like(batch, -100)
            for place, row in enumerate(ids):
                labels[place, len(row) - 1] = row[-1]
            model.train()(input_ids=batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        paths[name] = save(tmp_path_factory.mktemp(name), model.eval(), review_tokenizer)
        paths[name + " model"] = model
    return paths


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "reviews.jsonl", reviews())


def load(path):
    with np.load(path) as arrays:
        return arrays["chosen"]


def make_settings(model, table, output, **changes):
    settings = {"attacks": ("word_drop",), "severities": (1, 5), "seeds": (0, 1), "name": "sst2", "batch_size": 7}
    settings |= {"model": model, "data": str(table), "output": str(output), "task": "classification"}
    return RobustnessSettings(**(settings | changes))


@pytest.fixture(scope="module")
def compared(models, table, tmp_path_factory):
    output = tmp_path_factory.mktemp("eval")
    return evaluate_robustness(make_settings(models["trained"], table, output, against=models["untrained"])), output


def naive_choice(model, tokenizer, sentence):
    """The answer whose tokens are likeliest, one forward each."""
    scores = []
    for answer in ANSWERS:
        ids = sequence(tokenizer, sentence, answer)
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(log_probs[place - 1, ids[place]]) for place in range(1, len(ids))))
    return int(np.argmax(scores))


@pytest.mark.thorough
def test_accuracies_equal_a_loop_over_questions(compared, models, review_tokenizer):
    rows = compared[0]["models"]["model"]
    # cut_held_out puts rows of a single file into splits by their text; all of them are asked.
    assert compared[0]["documents"]["number"] == NUMBER
    model = models["trained model"]
    right = [naive_choice(model, review_tokenizer, row["sentence"]) == row["label"] for row in reviews()]
    assert rows["clean"]["accuracy"]["estimate"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.8


def test_sentences_without_spaces_have_no_words_to_drop(models, tmp_path):
    rows = [{"sentence": "机器翻译的质量取决于数据和模型的规模以及训练的方法", "label": n % 2} for n in range(NUMBER)]
    table = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="word_drop changes words, and no spaces separate"):
        evaluate_robustness(make_settings(models["untrained"], table, tmp_path / "out"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(models, table, tmp_path):
    train_tokenizer([Document("a", "\n".join(row["sentence"] for row in reviews()))], 290).save_pretrained(tmp_path)
    small = make_model("olmoe", vocab_size=260)
    small.save_pretrained(tmp_path / "model")
    settings = make_settings(str(tmp_path / "model"), table, tmp_path / "out", tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match=r"gives token id 2\d\d, and the model's vocabulary has 260 tokens"):
        evaluate_robustness(settings)


@pytest.mark.thorough
def test_attacked_accuracies_equal_a_loop_over_attacked_sentences(models, review_tokenizer, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", reviews(4, seed=5))
    write(folder / "validation.jsonl", reviews())
    settings = make_settings(models["trained"], folder, tmp_path / "out", severities=(5,), seeds=(3, 4))
    result = evaluate_robustness(settings)
    assert result["documents"]["source"].endswith("validation split")  # there is no test split
    attack, model = TEXT_ATTACKS["word_drop"], models["trained model"]
    right = {}
    for seed in (3, 4):
        right[str(seed)] = [
            naive_choice(
                model, review_tokenizer, attack(row["sentence"], 0.5, seed=seed, name=f"validation[{place}] sentence")
            )
            == row["label"]
            for place, row in enumerate(reviews())
        ]
    (row,) = result["models"]["model"]["attacks"]
    for seed, hits in right.items():
        assert row["seeds"][seed] == pytest.approx(np.mean(hits))
    attacked = np.mean(list(right.values()))
    assert row["accuracy"]["estimate"] == pytest.approx(attacked)
    clean = result["models"]["model"]["clean"]["accuracy"]["estimate"]
    assert row["difference"]["estimate"] == pytest.approx(attacked - clean)
    assert attacked < clean


@pytest.mark.thorough
def test_a_planted_difference_is_found(compared):
    comparisons = compared[0]["comparisons"]
    assert compared[0]["measure"] == {
        "level": "accuracy",
        "change": "difference",
        "lower_is_better": False,
        "also": [],
    }
    assert comparisons["clean"]["verdict"] == "better"
    levels = [model["clean"]["accuracy"]["estimate"] for model in compared[0]["models"].values()]
    assert comparisons["clean"]["estimate"] == pytest.approx(levels[0] - levels[1])
    mild, strong, both = compared[0]["models"]["model"]["attacks"]
    assert [row["severity"] for row in (mild, strong, both)] == [1, 5, None]
    assert strong["difference"]["verdict"] == "worse"  # than clean
    assert strong["accuracy"]["estimate"] < both["accuracy"]["estimate"] < mild["accuracy"]["estimate"]


@pytest.mark.thorough
def test_two_copies_are_not_distinguishable(models, table, tmp_path):
    shutil.copytree(models["trained"], tmp_path / "copy")
    result = evaluate_robustness(make_settings(models["trained"], table, tmp_path, against=str(tmp_path / "copy")))
    comparisons = result["comparisons"]
    rows = [row[name] for row in comparisons["attacks"] for name in ("accuracy", "difference")]
    for interval in (comparisons["clean"], *rows):
        assert interval["low"] == interval["estimate"] == interval["high"] == 0
        assert interval["p_value"] == 1
        assert interval["verdict"] == "not distinguishable"


@pytest.mark.thorough
def test_an_interrupted_run_resumes(models, table, tmp_path, monkeypatch):
    settings = make_settings(models["untrained"], table, tmp_path)
    calls = []
    original = classification.score_choices

    def score(*arguments, **options):
        calls.append(options["progress"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(classification, "score_choices", score)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(settings)
    resumed = evaluate_robustness(settings)
    assert len(calls) == 3 + 3  # clean and four cells, two of which were finished
    again = evaluate_robustness(settings)
    assert len(calls) == 6
    assert resumed["models"] == again["models"]
    evaluate_robustness(make_settings(models["untrained"], table, tmp_path, documents=12))
    assert len(calls) == 11


@pytest.mark.thorough
def test_a_task_with_a_metric_of_its_own_has_both(models, tmp_path):
    sentences = reviews()
    pairs = [
        {
            "sentence1": row["sentence"],
            "sentence2": sentences[place - place % 3]["sentence"],
            "label": int(place % 3 > 0),
        }
        for place, row in enumerate(sentences)
    ]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", pairs)
    changes = {"name": "mrpc", "against": models["untrained"], "severities": (1,)}
    settings = make_settings(models["trained"], tmp_path, tmp_path / "out", **changes)
    result = evaluate_robustness(settings)
    assert result["measure"]["also"] == ["f1"]
    (row,) = result["models"]["model"]["attacks"]
    level, clean = row["also"]["f1"]["level"], result["models"]["model"]["clean"]["also"]["f1"]["level"]
    paths = [path for seed in (0, 1) for path in (tmp_path / "out" / "cells").glob(f"word_drop-1-seed{seed}-*.npz")]
    right = [pair["label"] for pair in pairs]
    values = [
        f1_score(right * 2, np.concatenate([load(one), load(other)])) for one, other in product(paths[:2], paths[2:])
    ]
    # Each seed has an entry of each model.
    assert any(level["estimate"] == pytest.approx(value) for value in values)
    assert row["also"]["f1"]["difference"]["estimate"] == pytest.approx(level["estimate"] - clean["estimate"])
    verdict = result["comparisons"]["attacks"][0]["also"]["f1"]["level"]["verdict"]
    assert verdict in ("better", "worse", "not distinguishable")
    page = StringIO()
    print_robustness(result, Console(width=250, file=page))
    page = page.getvalue()
    assert "f1, attacked - clean" in page
    assert "there are 6." in page
    models_clean = [model["clean"]["also"]["f1"]["level"]["estimate"] for model in result["models"].values()]
    assert result["comparisons"]["also"]["f1"]["estimate"] == pytest.approx(models_clean[0] - models_clean[1])


@pytest.mark.thorough
def test_the_command_prints_accuracies_and_verdicts(models, table, compared, tmp_path):
    output = shutil.copytree(compared[1], tmp_path / "out")
    command = ["eval", models["trained"], "--against", models["untrained"], "--data", str(table), "--name", "sst2"]
    options = ["--task", "classification", "--attack", "word_drop", "--severity", "1,5", "--seeds", "0,1"]
    result = CliRunner().invoke(
        app, [*command, *options, "--output", str(output)], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    assert result.exit_code == 0
    page = " ".join(result.output.split())
    estimate = compared[0]["comparisons"]["clean"]["estimate"]
    names = [Path(models[name]).name for name in ("trained", "untrained")]
    assert f"On clean text, {names[0]} is better than {names[1]} (difference of accuracies {estimate:.4f}" in page
    assert f"{NUMBER} questions: {table}" in page
    assert "there are 7." in page
    assert json.loads((output / "result.json").read_text())["models"] == json.loads(json.dumps(compared[0]["models"]))


def test_without_data_there_is_a_stand_in(models, tmp_path):
    changes = {"data": None, "name": None, "documents": 12, "severities": (1,), "seeds": (0,), "attacks": None}
    result = evaluate_robustness(make_settings(models["untrained"], "", tmp_path, **changes))
    assert result["settings"]["attacks"] == ("aaa",)
    assert result["documents"]["number"] == 12
    assert any("no GLUE: a stand-in" in note for note in result["notes"])


def test_what_cannot_be_asked_is_refused(models, table, tmp_path, review_tokenizer):
    model, output = models["untrained"], tmp_path / "out"
    with pytest.raises(ConfigError, match=r"fog is an attack on images, and --task classification attacks text"):
        make_settings(model, table, output, attacks=("fog",))
    with pytest.raises(ConfigError, match=r"`block_size` is of --task text, not of classification"):
        make_settings(model, table, output, block_size=24)
    with pytest.raises(ConfigError, match=r"reviews.jsonl: the columns and labels of this data are unknown: .* --name"):
        evaluate_robustness(make_settings(model, table, output, name=None))
    with pytest.raises(ConfigError, match="leave --name out"):
        evaluate_robustness(make_settings(model, "embedded", output))
    with pytest.raises(DataError, match="no GLUE task `sst3`; did you mean `sst2`"):
        evaluate_robustness(make_settings(model, table, output, name="sst3"))
    with pytest.raises(DataError, match=r"no test split; it has train, validation"):
        evaluate_robustness(make_settings(model, table, output, split="test"))
    with pytest.raises(DataError, match=r"9 questions to ask; intervals need 10"):
        evaluate_robustness(make_settings(model, table, output, documents=9))
    short = make_model("olmoe", vocab_size=len(review_tokenizer), max_position_embeddings=16)
    path = save(tmp_path / "short", short, review_tokenizer)
    with pytest.raises(ConfigError, match=r"clean: a question has \d+ tokens, and .* takes 16"):
        evaluate_robustness(make_settings(path, table, output))
    digits = write(tmp_path / "digits.jsonl", [{"sentence": "1 2 3", "label": place % 2} for place in range(12)])
    with pytest.raises(DataError, match="keyboard at severity 1 changes nothing in 12 questions"):
        evaluate_robustness(make_settings(model, digits, output, attacks=("keyboard",)))
    assert not output.exists()
