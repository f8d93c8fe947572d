"""Studies of characters: their text, their damage and its scores, and models that others fine-tune."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from study_files import write_text
from torch.nn import functional as F

from symphony_hf.errors import DataError
from symphony_hf.experiments.ablation.cells import Results, StudyRun, digest_of, pretraining_of
from symphony_hf.experiments.ablation.damage import SPECIAL_TOKENS, damage_batch, replace_at_random
from symphony_hf.experiments.ablation.graph_control import GraphControl
from symphony_hf.experiments.ablation.measure import measure
from symphony_hf.experiments.ablation.model import build_model
from symphony_hf.experiments.ablation.point import Point
from symphony_hf.experiments.ablation.run import run_ablation, run_cell
from symphony_hf.experiments.ablation.study import load_study
from symphony_hf.experiments.ablation.text import contaminated, prepare_streams, read_streams
from symphony_hf.experiments.ablation.train import train
from symphony_hf.patching.symphonize import symphony_routers

PLAIN = Point(graph="identity").canonical()


@pytest.fixture
def make(make_study):
    return lambda study="", **changes: make_study(study, **{"data.tokenizer": "characters", **changes})


@pytest.fixture
def study(make):
    return make("damage: [0.1, 0.4]\ntest_tokens: 300")


def test_the_text_is_its_characters(study, text, tmp_path):
    documents = [path.read_text() for path in sorted((tmp_path / "text" / "test").iterdir())]
    alphabet = sorted({letter for path in (tmp_path / "text" / "train").iterdir() for letter in path.read_text()})
    assert text.vocab_size == len(alphabet) + 2
    assert len(text.test) == 300
    # Ends of texts are one token; the test text is the first of its documents.
    assert len(set(text.test[: len(documents[0])].tolist())) == len(set(documents[0]))
    again = read_streams(tmp_path / "out", text.digest)
    assert all(torch.equal(again.attacked[rate], text.attacked[rate]) for rate in ("0.1", "0.4"))


def test_damage_replaces_its_share_and_a_higher_rate_replaces_more():
    stream = np.random.default_rng(0).integers(0, 50, 20_000)
    mild, heavy = (replace_at_random(stream, rate, 50, seed=3) for rate in (0.05, 0.15))
    changed = [damaged != stream for damaged in (mild, heavy)]
    assert [float(one.mean()) for one in changed] == pytest.approx([0.05 * 47 / 50, 0.15 * 47 / 50], rel=0.1)
    assert (changed[1] | ~changed[0]).all()  # what is damaged mildly is damaged heavily, by the same token
    assert (mild[changed[0]] == heavy[changed[0]]).all()
    assert (np.minimum(mild, heavy)[changed[1]] >= SPECIAL_TOKENS).all()
    assert (stream[changed[1]] >= SPECIAL_TOKENS).all()
    assert (replace_at_random(stream, 0.15, 50, seed=3) == heavy).all()
    assert (replace_at_random(stream, 0.15, 50, seed=4) != heavy).any()
    assert (replace_at_random(stream, 0.0, 50, seed=3) == stream).all()


def test_a_damaged_batch_is_scored_where_it_was_left_alone():
    ids = torch.randint(0, 50, (8, 64), generator=torch.Generator().manual_seed(0))
    damaged, labels = damage_batch(ids, 0.3, 50, torch.Generator().manual_seed(1))
    for before, after, label in zip(ids.flatten(), damaged.flatten(), labels.flatten(), strict=True):
        assert label == (before if before == after else -100)
    assert 0.2 < (labels == -100).float().mean() < 0.35


def test_the_measures_are_those_of_a_loop_over_characters(study, text):
    torch.manual_seed(0)
    model = build_model(study.recipe, Point(), text.vocab_size)
    train(model, study, Point(), 0, text.train)
    measured = measure(model, text, 16)
    streams = {"clean": text.test, **text.attacked}
    nll, chosen = {}, {}
    for name, stream in streams.items():
        nll[name], chosen[name] = [], []
        for start in range(0, len(stream), 16):
            row = stream[None, start : start + 16]
            with torch.no_grad():
                output = model(input_ids=row, output_router_logits=True)
            nll[name] += [None, *F.cross_entropy(output.logits[0, :-1], row[0, 1:], reduction="none").tolist()]
            sets = [[set(top.tolist()) for top in logits.topk(2).indices] for logits in output.router_logits]
            chosen[name] += list(zip(*sets, strict=True))
    known = [value for value in nll["clean"] if value is not None]
    assert measured["clean_nats"] == pytest.approx(sum(known) / len(known), rel=1e-4)
    for rate in ("0.1", "0.4"):
        same = [i for i in range(300) if text.test[i] == text.attacked[rate][i]]
        scored = [nll[rate][i] for i in same if nll[rate][i] is not None]
        assert measured[f"damaged_nats_{rate}"] == pytest.approx(sum(scored) / len(scored), rel=1e-4)
        reached = [i for i in same if any(n not in same for n in range(i // 16 * 16, i))]
        kept = [len(a & b) / 2 for i in reached for a, b in zip(chosen["clean"][i], chosen[rate][i], strict=True)]
        assert measured[f"routing_kept_{rate}"] == pytest.approx(sum(kept) / len(kept), abs=1e-9)
        assert measured[f"reached_tokens_{rate}"] == len(reached)


def test_the_controls_are_what_they_say(study, text):
    torch.manual_seed(0)
    frozen = build_model(study.recipe, Point(graph="identity", control="frozen_routers"), text.vocab_size)
    before = {name: weight.clone() for name, weight in frozen.named_parameters()}
    train(frozen, study, Point(graph="identity", control="frozen_routers").canonical(), 0, text.train)
    changed = {name for name, weight in frozen.named_parameters() if not torch.equal(weight, before[name])}
    assert "model.layers.0.moe.experts.up_proj" in changed
    assert not [name for name in changed if ".gate." in name]
    few = build_model(study.recipe, Point(graph="identity", control="chosen_experts"), text.vocab_size)
    assert few.model.layers[0].moe.experts.num_experts == 2
    assert run_cell(study, StudyRun(Point(graph="identity", control="chosen_experts"), 0), text)["load_entropy"] == 1.0


def test_training_under_damage_is_another_training(study, text):
    runs = [run_cell(study, StudyRun(Point(graph="identity", damage=rate), 0), text) for rate in (0.0, 0.3, 0.3)]
    assert runs[0]["curve"] != runs[1]["curve"] == runs[2]["curve"]


def test_contamination_is_in_the_training_text_alone(make, tmp_path):
    first = f"pretraining: {{path: {write_text(tmp_path / 'first')}, max_steps: 1}}"
    studies = [make(f"{first}\ncontamination: {rate}") for rate in (0.0, 0.2)]
    texts = [prepare_streams(study, tmp_path / "out") for study in studies]
    assert texts[0].digest == texts[1].digest  # one text for all that is not trained on
    clean, damaged = (contaminated(study, text) for study, text in zip(studies, texts, strict=True))
    assert torch.equal(clean, texts[1].train)
    assert 0.15 < (clean != damaged).float().mean() < 0.2
    # The models that are fine-tuned are the same, and what is fine-tuned is not.
    for stage, is_shared in (("pretrain", True), ("tune", False), ("judge", False)):
        digests = {digest_of(study, StudyRun(PLAIN, 0, stage), texts[0].digest) for study in studies}
        assert (len(digests) == 1) == is_shared


def test_a_contaminated_run_trains_on_the_damage(make, tmp_path):
    runs = []
    for rate in (0.0, 0.4):
        study = make(f"contamination: {rate}")
        runs.append(run_cell(study, StudyRun(PLAIN, 0), prepare_streams(study, tmp_path / "out"))["curve"])
    assert runs[0] != runs[1]


def strengths_of(study, text, graph):
    point = Point(graph=graph, strength=0.5)
    model = build_model(study.recipe, point, text.vocab_size)
    control = GraphControl(model, point, 4, seed=0)
    seen = []
    for _ in range(4):
        control.before_update()
        control.after_update()
        seen.append([router.symphony.strength() for _, router in symphony_routers(model)])
    control.after_training()
    return [*seen, [router.symphony.strength() for _, router in symphony_routers(model)]]


def test_a_late_graph_fades_in_and_one_at_inference_is_used_afterwards(study, text):
    assert strengths_of(study, text, "late") == [[0.0] * 2, [0.0] * 2, [0.25] * 2, [0.5] * 2, [0.5] * 2]
    assert strengths_of(study, text, "inference") == [[0.0] * 2] * 4 + [[0.5] * 2]


def test_a_graph_in_some_layers_is_in_these_alone(study, text):
    model = build_model(study.recipe, Point(layers=(1,)), text.vocab_size)
    assert [name for name, _ in symphony_routers(model)] == ["model.layers.1.moe.gate"]
    assert "routing_kept_0.4" in run_cell(study, StudyRun(Point(layers=(1,)), 0), text)


@pytest.mark.parametrize(
    ("study", "changes", "named"),
    [("", {"max_steps": 10_000}, "train"), ("pretraining: {path: TEXT, max_steps: 10000}", {}, "pretrain")],
)
def test_a_text_that_is_too_short_is_refused_before_anything_is_run(make, tmp_path, study, changes, named):
    write_text(tmp_path / "first", seed=1)
    made = make(study.replace("TEXT", str(tmp_path / "first")), **changes)
    folder = {"train": tmp_path / "text", "pretrain": tmp_path / "first"}[named]
    message = rf"{folder}: {named} has [\d,]+ tokens, and a run reads 320,000, which is .* at most 4"
    with pytest.raises(DataError, match=message):
        run_ablation(made, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tuned(make, tmp_path):
    write_text(tmp_path / "first", seed=1)
    return make(f"seeds: [0]\ntest_tokens: 300\npretraining: {{path: {tmp_path / 'first'}, max_steps: 9}}")


@pytest.mark.thorough
def test_fine_tuning_starts_from_a_plain_model_that_forgets(tuned, tmp_path):
    text = prepare_streams(tuned, tmp_path / "out")
    results = Results(tmp_path / "out", tuned, text.digest)
    cell = StudyRun(Point(), 0)
    first = pretraining_of(tuned, cell)
    assert first == StudyRun(PLAIN, 0, "pretrain")
    results.save(first, run_cell(tuned, first, text, results))
    start = build_model(tuned.recipe, PLAIN, text.vocab_size, results.checkpoint(first))
    torch.manual_seed(0)
    random = build_model(tuned.recipe, PLAIN, text.vocab_size)
    before, after = (measure(model, text, 16)["forgotten_nats"] for model in (random, start))
    assert after < before - 0.1  # it has learned the first text
    run = run_cell(tuned, cell, text, results)
    assert math.isfinite(run["forgotten_nats"])
    # With a graph or not, the first loss is that of the same pre-trained model.
    assert run["curve"][0] == run_cell(tuned, StudyRun(PLAIN, 0), text, results)["curve"][0]
    assert json.loads(results.path(first).read_text())["tokens"] == 9 * 32


def test_controls_pretrain_as_they_are_fine_tuned(tuned):
    for control in ("frozen_routers", "chosen_experts"):
        point = Point(graph="identity", control=control).canonical()
        assert pretraining_of(tuned, StudyRun(point, 5, "tune", 0.1)) == StudyRun(point, 5, "pretrain")
    assert pretraining_of(tuned, StudyRun(Point(damage=0.1), 5)) == StudyRun(PLAIN, 5, "pretrain")


def test_conditional_selection_is_that_of_a_loop(study, text):
    point = Point(graph="identity", selection="conditional").canonical()
    torch.manual_seed(0)
    model = build_model(study.recipe, point, text.vocab_size).eval()
    router = model.model.layers[0].moe.gate
    hidden = torch.randn(50, 16)
    logits, weights, indices = (part.detach() for part in router(hidden))
    assert torch.equal(indices, logits.topk(2).indices)  # without edges, it is the top-k
    train(model, study, point, 0, text.train)
    adjacency = router.symphony.adjacency
    model.eval()
    logits, weights, indices = (part.detach() for part in router(hidden))
    router.preference_EE.mul_(1000)  # large enough for the graph to matter in every run
    changed = router(hidden)[2]
    for row, loads in zip(range(50), [adjacency.diagonal()] * 50, strict=True):
        first = int(logits[row].argmax())
        for factor, chosen in ((1, indices), (1000, changed)):
            given = [float(logits[row, j] + factor * (adjacency[first, j] / loads[first] - loads[j])) for j in range(4)]
            given[first] = -math.inf
            assert chosen[row].tolist() == [first, given.index(max(given))]
        expected = logits[row, indices[row]].softmax(0)
        torch.testing.assert_close(weights[row], expected)
    assert not torch.equal(changed, indices)


def test_conditional_selection_is_a_form_of_its_own(make):
    made = make("axes: {selection: [{graph: identity, selection: conditional}]}")
    assert made.points()[-1].label(made.base) == "smoe, no graph, selection conditional"
    assert made.points()[-1].plain == PLAIN


def test_gradients_of_the_router_are_forms_with_and_without_a_graph(make, text):
    forms = "[{graph: identity, router_gradient: dense}, {graph: identity, router_gradient: neighbours}, dense]"
    made = make(f"test_tokens: 300\naxes: {{router_gradient: {forms}}}")
    labels = [point.label(made.base) for point in made.points()]
    assert labels[-3:] == [
        "smoe, no graph, router_gradient dense",
        "smoe, no graph, router_gradient neighbours",
        "smoe, router_gradient dense",
    ]
    centred = Point(graph="identity", router_gradient="neighbours", normalization="centred")
    assert centred.canonical() == Point(
        graph="identity", strength=0.0, router_gradient="neighbours", normalization="centred"
    )
    assert Point(graph="identity", num_neighbours=3, normalization="centred").canonical() == PLAIN
    curves = [run_cell(made, StudyRun(point, 0), text)["curve"] for point in (PLAIN, *made.points()[-3:-1])]
    # The forward is the plain one: the first losses are equal, and the gradients differ.
    assert curves[0][0] == curves[1][0] == curves[2][0]
    assert curves[0][-1] != curves[1][-1] != curves[2][-1]


@pytest.mark.thorough
def test_the_studies_of_the_recipe_are_valid():
    folder = Path(__file__).parents[3] / "recipes" / "wikitext103-216m" / "ablation"
    for path in folder.glob("*.yaml"):
        assert load_study(path).left_out() == []
