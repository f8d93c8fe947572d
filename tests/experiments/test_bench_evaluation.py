"""`symphony bench-evaluation`: the forwards that the commands need are found, and measured beside them."""

import json

import pytest
import torch
from models import make_ids, make_llava, make_model

from symphony_hf import ConfigError, symphonize
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.experiments.bench import evaluation
from symphony_hf.experiments.bench.evaluation import noted_inputs, print_bench_evaluation, run_bench_evaluation


@pytest.mark.parametrize("make", [make_model, make_llava], ids=["olmoe", "llava"])
def test_the_tokens_of_every_forward_are_noted_once(make):
    """Of a model around others, its own: they are given what it has made of the tokens."""
    model, ids = make().eval(), [make_ids(seed=seed) for seed in range(2)]
    with noted_inputs() as inputs, torch.no_grad():
        for part in ids:
            model(input_ids=part)
        with pytest.raises(ValueError, match="exactly one"):
            model()
        model(input_ids=ids[0])
    model(input_ids=ids[1])  # after it, none
    assert [part.tolist() for part in inputs] == [part.tolist() for part in (*ids, ids[0])]


@pytest.mark.thorough
def test_rows_and_json(tmp_path, capsys, monkeypatch):
    texts = [f"the ship number {number} drifts at sea and its crew waits for wind\n" * 4 for number in range(10)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer([Document(str(number), text) for number, text in enumerate(texts)], 300)
    tokenizer.save_pretrained(tmp_path / "model")
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    symphonize(model).save_pretrained(tmp_path / "model")
    # Each reading of the clock is a second after the last, so what reads it twice takes a second.
    seconds = iter(range(10_000))
    monkeypatch.setattr(evaluation, "_clock", lambda: float(next(seconds)))
    path = tmp_path / "bench.json"
    result = run_bench_evaluation(str(tmp_path / "model"), rounds=2, data=str(data), output=path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [(row["command"], row["ratio"], row["noise"]) for row in result["rows"]] == [
        ("eval", 1.0, 1.0),
        ("routing", 1.0, 1.0),
        ("routing and its pictures", 2.0, 1.0),
    ]
    of_eval, observed, drawn = (row["forwards"] for row in result["rows"])
    assert observed == drawn > 0
    assert of_eval >= 16  # clean, and five severities with three seeds
    print_bench_evaluation(result)
    assert "routing" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("rounds", 0), ("documents", 0), ("threads", -1)])
def test_numbers_that_are_too_small_are_refused_before_the_model_is_loaded(option, value, tmp_path):
    with pytest.raises(ConfigError, match=f"bench-evaluation: `{option}` must be at least 1, got {value}"):
        run_bench_evaluation("no-such-model", **{option: value}, output=tmp_path / "bench.json")
