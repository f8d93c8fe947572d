"""`symphony merge`, `prune` and `topk`, from checkpoint to checkpoint, with what they measure."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import typer
from compression_tables import findings
from models import assert_folded, make_ids
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import symphony_hf.conversion.compression.shrink as shrinking
from symphony_hf import expert_graphs
from symphony_hf.cli import app
from symphony_hf.conversion.compression.graphs import centrality, graph_distance
from symphony_hf.conversion.compression.merge import cluster_experts, merge_experts
from symphony_hf.conversion.compression.prune import highest, prune_experts
from symphony_hf.conversion.compression.settings import MergeSettings, PruneSettings, TopKSettings
from symphony_hf.conversion.compression.tables import print_compression, print_sweep
from symphony_hf.conversion.compression.top_k import sweep_top_k
from symphony_hf.data.corpus import load_corpus
from symphony_hf.errors import EvaluationError
from symphony_hf.files import UNFINISHED

SMALL = {"block_size": 16, "batch_size": 4}


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=make_ids()).logits


def naive_perplexity(folder, data):
    """Compute the perplexity one window at a time, in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, number = 0.0, 0
    for document in load_corpus(data).test:
        ids = [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids), 16):
            window = ids[start : start + 16]
            with torch.no_grad():
                nll = -model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
            total += sum(float(nll[place, token]) for place, token in enumerate(window[1:]))
            number += len(window) - 1
    return float(np.exp(total / number))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.thorough
def test_merging_by_the_learned_graph(symphony, data_folder, tmp_path):
    output = tmp_path / "merged"
    small = ["--block_size", 16, "--batch_size", 4]
    assert run("merge", symphony, output, "--experts", 4, "--by", "graph", "--data", data_folder, *small).exit_code == 0
    result = json.loads((output / "result.json").read_text())
    graphs = expert_graphs(AutoModelForCausalLM.from_pretrained(symphony))
    assert result["made_of"] == {
        name: cluster_experts(graph_distance(graph), 4, num_groups=1) for name, graph in graphs.items()
    }
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert (config["num_experts"], "symphony" in config) == (4, False)
    perplexity = result["perplexity"]
    assert perplexity["before"]["estimate"] == pytest.approx(naive_perplexity(symphony, data_folder), rel=1e-5)
    assert perplexity["after"]["estimate"] == pytest.approx(naive_perplexity(output, data_folder), rel=1e-5)
    levels = perplexity["after"]["estimate"] / perplexity["before"]["estimate"]
    assert perplexity["ratio"]["estimate"] == pytest.approx(levels)
    assert perplexity["ratio"]["verdict"] in ("better", "worse", "not distinguishable")
    assert result["command"] == (
        f"symphony merge {symphony} {output} --data {data_folder} --block_size 16 --batch_size 4 --experts 4 --by graph"
    )
    assert result["parameters"]["after"]["total"] < result["parameters"]["before"]["total"]
    assert result["parameters"]["after"]["active"] < result["parameters"]["before"]["active"]  # smaller routers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_merging_by_outputs_weighs_by_load(plain, data_folder, tmp_path):
    output = tmp_path / "merged"
    result = merge_experts(
        MergeSettings(model=plain, output=str(output), experts=5, by="outputs", data=data_folder, **SMALL)
    )
    old, new = (AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp for folder in (plain, output))
    assert result["load_kept"] == [1.0, 1.0, 1.0]
    for place, members in enumerate(result["made_of"]["model.layers.0.mlp.gate"]):
        rows = old.gate.weight[members]
        lowest, highest_ = rows.min(0).values, rows.max(0).values
        assert ((new.gate.weight[place] >= lowest - 1e-6) & (new.gate.weight[place] <= highest_ + 1e-6)).all()
        if len(members) == 2:
            # The same share that mixes the rows mixes the experts.
            share = ((new.gate.weight[place] - rows[1]) @ (rows[0] - rows[1])) / (rows[0] - rows[1]).square().sum()
            for name in ("gate_up_proj", "down_proj"):
                first, second = getattr(old.experts, name)[members]
                mixed = share * first + (1 - share) * second
                torch.testing.assert_close(getattr(new.experts, name)[place], mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("by", ["load", "centrality", "reap"])
def test_pruning(by, symphony, data_folder, tmp_path):
    output = tmp_path / "pruned"
    settings = PruneSettings(model=symphony, output=str(output), experts=5, by=by, data=data_folder, **SMALL)
    result = prune_experts(settings)
    assert result == json.loads((output / "result.json").read_text())
    if by == "centrality":
        for name, graph in expert_graphs(AutoModelForCausalLM.from_pretrained(symphony)).items():
            assert result["made_of"][name] == [[number] for number in highest(centrality(graph), 5)]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (symphony, output))
    numbers = [members[0] for members in result["made_of"]["model.layers.1.mlp.gate"]]
    router = before.model.layers[1].mlp.gate
    folded = router.apply_graph(router.weight)[numbers]
    assert torch.equal(after.model.layers[1].mlp.gate.weight, folded)
    experts = before.model.layers[1].mlp.experts.down_proj[numbers]
    assert torch.equal(after.model.layers[1].mlp.experts.down_proj, experts)
    if by == "load":
        other = tmp_path / "other"
        assert prune_experts(
            PruneSettings(model=symphony, output=str(other), experts=5, by="reap", data=data_folder, **SMALL)
        )["load_kept"] <= [share + 1e-9 for share in result["load_kept"]]


def test_all_experts_kept_are_the_model_folded(symphony, data_folder, tmp_path):
    output = tmp_path / "same"
    prune_experts(PruneSettings(model=symphony, output=str(output), experts=8, by="load", data=data_folder, **SMALL))
    assert_folded(logits(output), logits(symphony))


@pytest.mark.thorough
def test_a_counted_graph_serves_plain_models(plain, data_folder, tmp_path):
    settings = {"model": plain, "experts": 4, "graph": "counted", "data": data_folder, **SMALL}
    merged = merge_experts(MergeSettings(output=str(tmp_path / "merged"), by="graph", **settings))
    pruned = prune_experts(PruneSettings(output=str(tmp_path / "pruned"), by="centrality", **settings))
    console = Console(record=True, width=200)
    print_compression(merged, console)
    assert "merge by graph (counted)" in console.export_text()
    print_compression(pruned, console)
    printed = console.export_text()
    assert "prune by centrality (counted)" in printed
    assert "selections were of removed experts" in printed


def test_a_result_in_the_output_stays_there(plain, data_folder, tmp_path):
    file = tmp_path / "pruned" / "numbers" / "mine.json"
    where = {"output": str(tmp_path / "pruned"), "result": str(file), "data": data_folder}
    result = prune_experts(PruneSettings(model=plain, experts=4, by="load", **where, **SMALL))
    assert json.loads(file.read_text()) == result
    assert (tmp_path / "pruned" / "config.json").exists()


def test_the_sweep(plain, data_folder, tmp_path):
    result = sweep_top_k(TopKSettings(model=plain, data=data_folder, result=str(tmp_path / "sweep.json"), **SMALL))
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    assert [row["top_k"] for row in result["rows"]] == [1, 2, 3]
    assert result["rows"][-1]["ratio"]["estimate"] == 1
    active = [row["parameters"]["active"] for row in result["rows"]]
    assert active[1] - active[0] == active[2] - active[1] == 3 * (2 * 24 * 32 + 24 * 32)
    console = Console(record=True, width=200)
    print_sweep(result, console)
    printed = console.export_text()
    assert all(f"{row['perplexity']['estimate']:.2f}" in printed for row in result["rows"])
    assert f"{result['rows'][0]['ratio']['estimate']:.3f}" in printed
    own = next(line for line in printed.splitlines() if line.startswith("│ 3"))
    assert own.count("[") == 1  # its perplexity; a ratio to itself says nothing


@pytest.mark.thorough
def test_the_sweep_writes_the_one_that_is_kept(symphony, data_folder, tmp_path):
    output, small = tmp_path / "top2", ["--data", data_folder, "--block_size", 16]
    assert run("topk", symphony, output, "--top_k", "1,2", "--keep", 2, *small).exit_code == 0
    result = json.loads((output / "result.json").read_text())
    assert result["kept"] == 2
    assert json.loads((output / "config.json").read_text())["num_experts_per_tok"] == 2
    measured = result["rows"][1]["perplexity"]["estimate"]
    assert measured == pytest.approx(naive_perplexity(output, data_folder), rel=1e-5)


@pytest.mark.parametrize(
    ("command", "settings"), [("merge", MergeSettings), ("prune", PruneSettings), ("topk", TopKSettings)]
)
def test_a_command_has_a_parameter_for_each_setting_and_no_other(command, settings):
    """Defaults that both have are the same."""
    parameters = {parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].params}
    fields = {field.name: field for field in dataclasses.fields(settings)}
    assert set(parameters) == set(fields)
    for name, parameter in parameters.items():
        if not parameter.required:
            assert parameter.default == fields[name].default


def result_of(by, perplexity, *, experts=4, model="m", command="merge"):
    documents = {"names": [f"{n}" for n in range(20)], "nll": [perplexity + n for n in range(20)]}
    return {
        "command": f"symphony {command} {model}",
        "settings": {"model": model, "by": by, "graph": "learned", "seed": 0},
        "experts": {"after": experts},
        "documents": {"after": documents | {"num_tokens": [10] * 20}},
    }


def test_what_a_graph_decided_is_compared_with_the_baseline_of_as_many_experts():
    graph, outputs = result_of("graph", 1.0), result_of("outputs", 2.0)
    (sentence,) = findings([graph, outputs])
    assert sentence.startswith("m: merge by graph (learned), against outputs: perplexity -")
    for other in ({"experts": 6}, {"model": "other"}, {"command": "prune"}):
        assert findings([graph, result_of("outputs", 2.0, **other)]) == []


def test_nothing_is_left_of_what_could_not_be_measured(plain, data_folder, tmp_path, monkeypatch):
    calls = []

    def score_once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise EvaluationError("not finite")
        return score(*args)

    score = shrinking.score
    monkeypatch.setattr(shrinking, "score", score_once)
    with pytest.raises(EvaluationError):
        prune_experts(
            PruneSettings(model=plain, output=str(tmp_path / "out"), experts=4, by="load", data=data_folder, **SMALL)
        )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.thorough
def test_the_same_command_twice_is_the_same(plain, data_folder, tmp_path):
    results = []
    for name in ("a", "b"):
        settings = MergeSettings(
            model=plain, output=str(tmp_path / name), experts=4, by="outputs", data=data_folder, seed=3, **SMALL
        )
        results.append(merge_experts(settings))
    assert results[0]["documents"] == results[1]["documents"]
    assert results[0]["made_of"] == results[1]["made_of"]
