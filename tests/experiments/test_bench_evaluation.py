"""`symphony bench-evaluation` measures the commands beside the forwards that they need, called as they call them."""

import json

import pytest
from models import make_model
from transformers import LlamaConfig, LlamaForCausalLM

from symphony_hf import ConfigError, UnsupportedModelError, symphonize
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.experiments.bench import evaluation
from symphony_hf.experiments.bench.evaluation import print_bench_evaluation, run_bench_evaluation


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
    monkeypatch.setattr(evaluation, "clock", lambda device: float(next(seconds)))
    given, forwards = [], evaluation._run_forwards
    monkeypatch.setattr(evaluation, "_run_forwards", lambda bare, calls: given.append(calls) or forwards(bare, calls))
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
    # The bare forwards, twice in each of two rounds, get what the commands gave: no head where routers alone are read.
    assert [len(calls) for calls in given] == [of_eval] * 4 + [observed] * 4
    assert {tuple(call) for call in given[0]} == {("input_ids", "attention_mask")}
    assert {(*call, call.get("logits_to_keep")) for call in given[-1]} >= {
        ("input_ids", "attention_mask", "logits_to_keep", 1)
    }
    assert evaluation.ModelUnderTest.on_load is None
    print_bench_evaluation(result)
    assert "routing" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("rounds", 0), ("documents", 0), ("threads", -1)])
def test_numbers_that_are_too_small_are_refused_before_the_model_is_loaded(option, value, tmp_path):
    with pytest.raises(ConfigError, match=f"bench-evaluation: `{option}` must be at least 1, got {value}"):
        run_bench_evaluation("no-such-model", **{option: value}, output=tmp_path / "bench.json")


def test_a_model_without_experts_is_refused_before_anything_runs(tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(evaluation, "_run_eval", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(UnsupportedModelError):
        run_bench_evaluation(str(tmp_path / "dense"), output=tmp_path / "bench.json")
