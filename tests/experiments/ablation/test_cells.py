"""One cell: its graphs' controls, its training and its numbers, against loops over tokens."""

import json
import math
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from symphony_hf.errors import DataError, SymphonyWarning
from symphony_hf.experiments.ablation.cells import StudyRun
from symphony_hf.experiments.ablation.graph_control import GraphControl, shuffled
from symphony_hf.experiments.ablation.measure import DivergedError, Reading, measure
from symphony_hf.experiments.ablation.model import build_model
from symphony_hf.experiments.ablation.point import SYSTEMS, Point
from symphony_hf.experiments.ablation.run import run_cell
from symphony_hf.experiments.ablation.text import prepare_streams, read_streams
from symphony_hf.experiments.ablation.train import batches, train
from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.symphonize import expert_graphs


@pytest.fixture
def study(make_study):
    return make_study("")


def test_the_attacked_text_is_the_test_text_with_a_word_of_its_own(study, text, tmp_path):
    attacked = text.attacked["word swap"]
    changed = text.test != attacked
    assert 0.05 < changed.float().mean() < 0.15
    # Its word is in the vocabulary, though no training text has it: the last, and never the unknown word's.
    assert set(attacked[changed].tolist()) == {text.vocab_size - 1}
    assert text.vocab_size - 1 not in text.train
    again = read_streams(tmp_path / "out", text.digest)
    assert all(torch.equal(a, b) for a, b in zip(again[:3], text[:3], strict=True))
    assert torch.equal(again.attacked["word swap"], attacked)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval.attack_rate": 0.0, "eval.attack_minimum": 0},
        {"data.tokenizer": "characters", "data.block_size": 64, "study": "damage: [1.0e-9]"},
    ],
    ids=["words", "characters"],
)
def test_an_attack_that_changes_nothing_is_refused_before_any_run(make_study, tmp_path, changes):
    with pytest.raises(DataError, match="no token has an attacked one before it in its row: raise the"):
        prepare_streams(make_study(**changes), tmp_path / "out")
    assert not list(tmp_path.glob("out/text-*"))


def test_batches_take_every_row_once_before_any_twice():
    stream = torch.arange(50)
    order = batches(stream, 4, 5, seed=0)
    taken = torch.cat([next(order) for _ in range(12)])[:, 0].tolist()
    assert sorted(taken[:12]) == sorted(taken[12:24]) == list(range(0, 48, 4))
    assert taken[:12] != taken[12:24]
    assert torch.equal(next(batches(stream, 4, 5, seed=0)), next(batches(stream, 4, 5, seed=0)))


def run_steps(study, text, graph, steps=5, seed=0, **settings):
    """Graphs after each step, as counted and as routed by, with a control or without."""
    torch.manual_seed(0)
    point = Point(graph=graph, decay=0.5, **settings)
    model = build_model(study.recipe, point, text.vocab_size).train()
    control = GraphControl(model, point, steps, seed)
    order = batches(text.train, 16, 2, seed=0)
    seen = []
    for _ in range(steps):
        ids = next(order)
        model(input_ids=ids, labels=ids).loss.backward()
        control.before_update()
        update_graphs(model)
        control.after_update()
        seen.append(list(expert_graphs(model).values()))
    return seen, control


def test_a_frozen_graph_moves_as_long_as_it_may_and_then_stays(study, text):
    moving, _ = run_steps(study, text, "ema")
    frozen, _ = run_steps(study, text, "frozen", freeze_after=0.4)
    for layer in range(2):
        assert torch.equal(frozen[1][layer], moving[1][layer])
        assert not torch.equal(moving[1][layer], moving[4][layer])
        assert all(torch.equal(frozen[step][layer], frozen[1][layer]) for step in (2, 3, 4))


def test_a_random_graph_is_the_learned_one_between_other_experts(study, text):
    shuffled_steps, control = run_steps(study, text, "random")
    for step, graphs in enumerate(shuffled_steps):
        for layer, routed_EE in enumerate(graphs):
            order = control.orders[layer].tolist()
            learned_EE = torch.empty_like(routed_EE)
            for row, j in enumerate(order):
                for column, k in enumerate(order):
                    learned_EE[j, k] = routed_EE[row, column]
            assert not torch.equal(routed_EE, learned_EE)
            if step == len(shuffled_steps) - 1:
                assert torch.equal(control.learned[layer], learned_EE)
    _, other = run_steps(study, text, "random", seed=1)
    assert [order.tolist() for order in other.orders] != [order.tolist() for order in control.orders]
    # The average goes on from itself, not from what was shuffled: its trace is that of top-2 of 4 at every step.
    assert all(abs(float(graph.trace()) - 2) < 1e-5 for graph in control.learned)


def test_shuffling_is_a_renaming():
    adjacency = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    order = torch.tensor([2, 0, 1])
    assert shuffled(adjacency, order).tolist() == [[6, 3, 5], [3, 1, 2], [5, 2, 4]]


def test_the_measures_are_those_of_a_loop_over_rows(study, text):
    torch.manual_seed(0)
    model = build_model(study.recipe, Point(), text.vocab_size)
    train(model, study, Point(), 0, text.train)
    measured = measure(model, text, 16)
    nll, chosen = {}, {}
    streams = {"test": text.test, "attacked": text.attacked["word swap"]}
    for name, stream in streams.items():
        nll[name], chosen[name] = [], []
        for start in range(0, len(stream), 16):
            row = stream[None, start : start + 16]
            with torch.no_grad():
                output = model(input_ids=row, output_router_logits=True)
            losses = F.cross_entropy(output.logits[0, :-1], row[0, 1:], reduction="none")
            nll[name] += [None, *losses.tolist()]
            sets = [[set(top.tolist()) for top in logits.topk(2).indices] for logits in output.router_logits]
            chosen[name] += list(zip(*sets, strict=True))
    perplexity = {}
    for name, values in nll.items():
        known = [value for value in values if value is not None]
        perplexity[name] = math.exp(sum(known) / len(known))
    same = [index for index in range(len(text.test)) if text.test[index] == streams["attacked"][index]]
    reached = [i for i in same if any(n not in same for n in range(i // 16 * 16, i))]
    assert 0 < len(reached) < len(same)
    kept = [len(a & b) / 2 for i in reached for a, b in zip(chosen["test"][i], chosen["attacked"][i], strict=True)]
    entropies = []
    for layer in range(2):
        counts = [sum(expert in of_word[layer] for of_word in chosen["test"]) for expert in range(4)]
        shares = [count / sum(counts) for count in counts if count]
        entropies.append(-sum(share * math.log(share) for share in shares) / math.log(4))
    untouched = [nll["attacked"][i] for i in same if nll["attacked"][i] is not None]
    assert measured["clean"] == pytest.approx(perplexity["test"], rel=1e-4)
    assert measured["attacked"] == pytest.approx(perplexity["attacked"], rel=1e-4)
    assert measured["ratio"] == pytest.approx(perplexity["attacked"] / perplexity["test"], rel=1e-4)
    assert measured["untouched_attacked"] == pytest.approx(math.exp(sum(untouched) / len(untouched)), rel=1e-4)
    assert measured["routing_kept"] == pytest.approx(sum(kept) / len(kept), abs=1e-9)
    assert measured["reached_tokens"] == len(reached)
    assert measured["load_entropy"] == pytest.approx(sum(entropies) / 2, abs=1e-9)
    predicted = [index for index, value in enumerate(nll["test"]) if value is not None]
    assert measured["attacked_tokens"] == len(set(predicted) - set(same)) > 0


def test_a_run_has_the_size_of_its_vocabulary(study, text):
    assert run_cell(study, StudyRun(Point(), 0), text)["vocab_size"] == text.vocab_size


def test_a_run_that_diverged_is_a_result(make_study, tmp_path):
    study = make_study("", learning_rate=1e30)  # weights are soon not finite
    text = prepare_streams(study, tmp_path / "out")
    with pytest.warns(SymphonyWarning, match="not finite"):
        run = run_cell(study, StudyRun(Point(), 0), text)
    assert run["diverged"] is True
    assert "clean" not in run


def test_a_loss_without_a_perplexity_is_of_a_run_that_diverged():
    reading = Reading(torch.full((3,), 800.0), torch.zeros(1, 3, 1), torch.ones(3, dtype=torch.bool))
    with pytest.raises(DivergedError, match="a loss of 800 nats"):
        _ = reading.perplexity


def test_a_cell_is_the_same_each_time(study, text):
    first, second = (run_cell(study, StudyRun(Point(), 1), text) for _ in range(2))
    for name in ("clean", "attacked", "routing_kept", "curve", "graphs"):
        assert json.dumps(first[name]) == json.dumps(second[name])
    assert run_cell(study, StudyRun(Point(), 2), text)["clean"] != first["clean"]


@pytest.mark.thorough
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_plain_form_is_the_model_that_was_never_symphonized(study, text, system, monkeypatch):
    cell = StudyRun(Point(system=system, graph="identity").canonical(), 1)
    plain = run_cell(study, cell, text)
    heard = run_cell(study, StudyRun(Point(system=system), 1), text)
    # The same weights and batches at the first step, where the graph is still the identity.
    assert plain["curve"][0] == heard["curve"][0]
    assert plain["curve"][-1] != heard["curve"][-1]
    monkeypatch.setattr("symphony_hf.experiments.ablation.model.symphonize", lambda model, config: model)
    monkeypatch.setattr("symphony_hf.experiments.ablation.train.update_graphs", lambda model: None)
    monkeypatch.setattr("symphony_hf.experiments.ablation.train.GraphControl", mock.MagicMock())
    monkeypatch.setattr("symphony_hf.experiments.ablation.run.expert_graphs", lambda model: {})
    stock = run_cell(study, cell, text)
    for name in ("curve", "clean", "attacked", "validation", "routing_kept"):
        assert json.dumps(stock[name]) == json.dumps(plain[name])


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_systems_differ_by_what_their_papers_say(study, text, system):
    model = build_model(study.recipe, Point(system=system), text.vocab_size)
    kinds = [type(layer.moe.gate).__mro__[2].__name__ if layer.moe else "dense" for layer in model.model.layers]
    expected = {
        "smoe": ["LinearRouter"] * 2,
        "xmoe": ["CosineRouter"] * 2,
        "glam": ["LinearRouter", "dense"],
        "smoothsmoe": ["SmoothRouter"] * 2,
        "momentumsmoe": ["LinearRouter"] * 2,
    }
    assert kinds == expected[system]
    assert {layer.momentum for layer in model.model.layers} == {0.7 if system == "momentumsmoe" else None}
