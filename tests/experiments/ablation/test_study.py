"""From a study to its cells: each routing once, under a name that its settings alone decide."""

import dataclasses
import shlex

import pytest
import yaml

from symphony_hf.errors import ConfigError
from symphony_hf.experiments.ablation.cells import (
    VERSIONS,
    Results,
    StudyRun,
    cells_of,
    describe_plan,
    digest_of,
    pretraining_of,
)
from symphony_hf.experiments.ablation.point import Point
from symphony_hf.experiments.ablation.report import write_ablation

AXES = """
systems: [smoe, glam]
seeds: [3, 4]
axes:
  strength: [0, 0.5, 1.0]
  graph: [identity, learned]
  normalization: [conditional, {self_loops: false}]
"""


def test_the_points_are_one_change_each_and_each_routing_once(make_study):
    study = make_study(AXES)
    assert [point.label(study.base) for point in study.points()] == [
        "smoe, no graph",
        "smoe, routers frozen at random",
        "smoe, only as many experts as are chosen (no routing)",
        "smoe, graph",
        "glam, no graph",
        "glam, graph",
        "smoe, strength 0.5",
        "smoe, graph learned",
        "smoe, normalization conditional",
        "smoe, self_loops false",
    ]
    cells = cells_of(study)
    assert len(set(cells)) == len(cells) == 20
    # The pairs of every seed come first, so that what a stopped study has is whole.
    assert [cell.seed for cell in cells] == [3] * 6 + [4] * 6 + [3] * 4 + [4] * 4


def test_a_product_has_every_combination(make_study):
    study = make_study("product: true\naxes: {strength: [0.25, 0.5], decay: [0.9, 0.99], graph: [ema, random]}")
    assert len(study.points()) == 2 + 2 + 8
    assert study.left_out() == []


def test_values_that_change_no_run_are_left_out_and_layers_have_no_order(make_study):
    study = make_study("axes: {num_neighbours: [1, 2], freeze_after: [0.5], layers: [[1, 0], [0, 1, 1]]}")
    assert study.left_out() == [
        f"{name}: the runs would be those of the base point" for name in ("num_neighbours 1", "freeze_after 0.5")
    ]
    assert [point.layers for point in study.points() if point.layers is not None] == [(0, 1)]


@pytest.mark.thorough
def test_a_product_lists_invalid_combinations_as_left_out(make_study, tmp_path):
    axes = "{smoothing: [logits, scores], normalization: [row, symmetric, {self_loops: false}], graph: [ema, learned]}"
    study = make_study(f"product: true\naxes: {axes}")
    labels = [point.label(study.base) for point in study.points()]
    assert labels == [
        "smoe, no graph",
        "smoe, routers frozen at random",
        "smoe, only as many experts as are chosen (no routing)",
        "smoe, graph",
        "smoe, graph learned",
        "smoe, normalization symmetric",
        "smoe, normalization symmetric, graph learned",
        "smoe, self_loops false",
        "smoe, smoothing scores",
        "smoe, smoothing scores, graph learned",
        "smoe, smoothing scores, self_loops false",
    ]
    left_out = study.left_out()
    assert [line.split(":")[0] for line in left_out] == [
        "smoothing logits, self_loops False, graph learned",
        "smoothing scores, normalization symmetric, graph ema",
        "smoothing scores, normalization symmetric, graph learned",
        "smoothing scores, self_loops False, graph learned",
    ]
    plan = describe_plan(study, Results(tmp_path / "out", study, "text"), seconds_per_cell=1.0, workers=1)
    assert [line for line in plan if "left out" in line] == [f"  left out {line}" for line in left_out]
    assert write_ablation(study, Results(tmp_path / "out", study, "text"), {})["left_out"] == left_out


@pytest.mark.parametrize("study", ["systems: [glam]\naxes: {system: [smoe, xmoe]}", "axes: {system: [glam, xmoe]}"])
def test_a_system_that_only_an_axis_has_brings_its_own_plain_one(make_study, study):
    points = make_study(study).points()
    assert {point.system for point in points} == {"smoe", "xmoe", "glam"}
    assert all(point.plain in points for point in points)


def test_what_decides_the_numbers_decides_the_digest(make_study):
    study = make_study(AXES)
    cell = cells_of(study)[1]
    base = digest_of(study, cell, "text")
    assert base == digest_of(study, cell, "text")
    others = [
        digest_of(study, cell._replace(seed=9), "text"),
        digest_of(study, cell._replace(point=dataclasses.replace(cell.point, decay=0.5)), "text"),
        digest_of(study, cell, "other text"),
        digest_of(make_study(AXES, max_steps=7), cell, "text"),
        digest_of(make_study(AXES, **{"model.config": {**study.recipe.model.config, "num_experts": 8}}), cell, "text"),
    ]
    assert len({base, *others}) == 6
    # What does not decide them does not.
    assert digest_of(make_study(AXES, logging_steps=3), cell, "text") == base


def test_the_plan_says_what_waits_and_how_long(make_study, tmp_path):
    study = make_study(AXES)
    results = Results(tmp_path / "out", study, "text")
    results.save(cells_of(study)[2], {})
    lines = describe_plan(study, results, seconds_per_cell=720.0, workers=2)
    assert lines[0] == "10 points, 2 seeds: 20 runs of 192 tokens (6 steps); 1 are done"
    assert [line.split()[0] for line in lines[1:-1]] == ["waiting"] * 2 + ["done"] + ["waiting"] * 17
    assert lines[-1] == "About 720 s per run, 1.9 hours for 19 of them, 2 at a time"


@pytest.mark.parametrize(
    ("study", "overrides", "message"),
    [
        ("axes: {layers: [[7]]}", {}, "point `smoe, layers .7.` cannot be run: .*layer 7 of `layers` has no router"),
        ("systems: [glam]\nbase: {layers: [1]}", {}, "point `glam, graph` cannot be run: .*layer 1 of `layers`"),
        (
            "axes: {router_gradient: [{graph: identity, router_gradient: neighbours, num_neighbours: 9}]}",
            {},
            "router_gradient neighbours, num_neighbours 9` cannot be run: .*`num_neighbours` is 9, .* at most 2",
        ),
        ("axis: {}", {}, "unknown setting `axis`; did you mean `axes`"),
        ("axes: {strenght: [1]}", {}, "unknown setting `strenght`; did you mean `strength`"),
        ("axes: {graph: [emma]}", {}, "`graph` is 'emma'; did you mean `ema`"),
        ("axes: {decay: 0.9}", {}, "must be a list of values"),
        ("axes: {normalization: [{smoothing: scores, normalization: symmetric}]}", {}, "scores.*needs.*row"),
        ("systems: [smoke]", {}, "known are smoe, xmoe, glam, smoothsmoe"),
        ("seeds: [1, 1]", {}, "each once"),
        ("seeds: [a, b]", {}, "whole numbers"),
        ("seeds: [0.5]", {}, "whole numbers"),
        ('product: "no"', {}, "true or false; got 'no'"),
        ("", {"symphony.strength": 0.5}, "has symphony.strength 0.5.*`base: {strength: 0.5}`"),
        ("", {"symphony.graph": "learned"}, "has symphony.graph learned"),
        ("", {"symphony.router_gradient": "dense"}, "has symphony.router_gradient dense"),
        ("axes: {layers: [[0]]}", {"symphony.balance_loss_weight": 0.01}, "`layers` .0. has router losses in these"),
        ("base: {decay: 0.9}", {"symphony.decay": 0.5}, "has symphony.decay 0.5"),
        ("base: {freeze_after: 0}", {}, "share of the steps"),
        ("", {"lr_scheduler_type": "cosine"}, "constant rate"),
        ("", {"max_steps": -1}, "positive whole `max_steps`, got -1"),
        ("", {"max_steps": 2.5}, "positive whole `max_steps`, got 2.5"),
        ("", {"max_steps": True}, "`max_steps` .* must be a number, got True"),
        ("", {"per_device_train_batch_size": 1.5}, "positive whole `per_device_train_batch_size`"),
        ("", {"learning_rate": float("inf")}, "`learning_rate` .* must be a number, got inf"),
        ("", {"learning_rate": 0}, "positive `learning_rate`"),
        ("", {"warmup_steps": -5}, "`warmup_steps` must be 0 or more"),
        ("", {"warmup_steps": float("nan")}, "`warmup_steps` .* must be a number, got nan"),
        ("learning_rates: [.inf]\ntuning_seeds: [9]", {}, "positive numbers, each once"),
        (f"seeds: [{2**64}]", {}, "must be below"),
        ("", {"learning_rate": "fast"}, "must be a number, got 'fast'"),
        ("base: {graph: identity}\naxes: {decay: [0.9]}", {}, "base point has no graph"),
        ("", {"gradient_accumulation_steps": 4, "optim": "sgd"}, "nothing of .* gradient_accumulation_steps, optim"),
        ("", {"max_grad_norm": 1.0}, "`train.max_grad_norm` must be 0.0"),
        ("", {"weight_decay": 0.1}, "`train.weight_decay` must be 0.0"),
        ("", {"model.dtype": "bfloat16"}, "`model.dtype` must be auto"),
        ("", {"eval.context": 4}, "`eval.context` must be 0"),
        ("", {"data.tokenizer": "bpe"}, "of kind `text` by `words` or `characters`"),
        ("", {"data.packing": True}, "`data.packing` must be False"),
        ("", {"model.path": "somewhere"}, "must build a `wikitext_moe` model"),
        ("damage: [0.05, 1.5]", {}, "`damage` is a share of the text, above 0 to below 1; got 1.5"),
        ("damage: []", {}, "one or more rates, each once"),
        ("contamination: -0.1", {}, "`contamination` is a share of the text, from 0 to below 1; got -0.1"),
        ("axes: {damage: [1.0]}", {}, "`damage` is a share of the training input"),
        ("axes: {control: [frozen_routers]}", {}, "has no graph: set `graph: identity`"),
        ("learning_rates: [0.1]", {}, "belong together"),
        ("learning_rates: [0.1, 0.1]\ntuning_seeds: [9]", {}, "positive numbers, each once"),
        ("learning_rates: [0.1]\ntuning_seeds: [0]", {}, "seeds 0 are in `seeds` and in `tuning_seeds`"),
        ("pretraining: {path: text}", {}, "max_steps"),
        ("pretraining: {path: text, max_steps: 0}", {}, "`max_steps` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(make_study, study, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_study(study, **overrides)


def test_a_plan_counts_the_pre_training_of_judged_seeds_at_its_own_length(make_study, tmp_path):
    first = f"pretraining: {{path: {tmp_path / 'text'}, max_steps: 60}}"
    study = make_study(f"seeds: [0, 1]\nlearning_rates: [0.1, 0.2]\ntuning_seeds: [8]\n{first}")
    lines = describe_plan(study, Results(tmp_path / "out", study, "text"), seconds_per_cell=36.0, workers=1)
    # Four points at two rates with one seed, four with two seeds, and three pre-trained models (the plain one and the
    # two controls') with three seeds, each as long as ten of the runs of 6 steps.
    assert lines[0].endswith("25 runs of 192 tokens (6 steps); 0 are done")
    assert lines[-2:] == [
        "  waiting  8 runs at learning rates that are not chosen yet",
        "About 36 s per run, 1.1 hours for 25 of them, 1 at a time",  # 16 + 90 of 36 s
    ]


def test_a_pre_training_without_its_weights_is_not_done(make_study, tmp_path):
    study = make_study(f"seeds: [0]\npretraining: {{path: {tmp_path / 'text'}, max_steps: 9}}")
    results = Results(tmp_path / "out", study, "text")
    cell = cells_of(study)[0]
    first = pretraining_of(study, cell)
    for run in (cell, first):
        results.save(run, {"stage": run.stage})
    assert (results.has(cell), results.has(first)) == (True, False)
    results.checkpoint(first).parent.mkdir()
    results.checkpoint(first).touch()
    assert results.has(first)


@pytest.mark.parametrize("form", [{"router_type": "cosine"}, {"moe_every": 2}, {"momentum": 0.5}])
def test_a_recipe_of_another_system_is_refused(make_study, form):
    config = make_study("").recipe.model.config
    with pytest.raises(ConfigError, match=f"has {next(iter(form))} .*a system of its own"):
        make_study("", **{"model.config": {**config, **form}})


def test_what_the_recipe_and_the_base_both_say_is_no_contradiction(make_study):
    study = make_study("base: {decay: 0.9}", **{"symphony.decay": 0.9})
    assert study.points()[-1].decay == 0.9


def test_the_warm_up_is_trainers(make_study):
    assert make_study("", warmup_steps=0.4).warmup_steps == 3  # of 6, rounded up
    assert make_study("", warmup_steps=4).warmup_steps == 4
    assert make_study("", lr_scheduler_type="constant").warmup_steps == 0


def test_the_command_says_the_changes_so_that_they_are_read_again(make_study):
    changes = {"eval.documents": None, "data.path": "my text", "model.dtype": "auto", "max_steps": 3}
    words = shlex.split(make_study("", **changes).command)
    told = dict(word.split("=", 1) for word in words if "=" in word)
    assert {name: yaml.safe_load(value) for name, value in told.items()} == {**changes, "data.path": "TEXT"}


def test_cells_of_other_versions_are_not_taken(make_study, monkeypatch):
    study = make_study(AXES)
    cell = cells_of(study)[0]
    before = digest_of(study, cell, "text")
    monkeypatch.setitem(VERSIONS, "torch", "1.0")
    assert digest_of(study, cell, "text") != before


def test_numbers_may_be_written_as_yaml_does_not_read_them(make_study):
    assert make_study("", learning_rate="1e-3").learning_rate == 0.001


def test_a_dense_gradient_in_some_layers_is_compared_with_one_in_the_same_layers():
    point = Point(router_gradient="dense", layers=(0, 1))
    assert point.without_graph == Point(graph="identity", strength=0.0, router_gradient="dense", layers=(0, 1))
    assert point.plain.layers is None


@pytest.mark.parametrize("reads", [{"selection": "conditional"}, {"router_gradient": "neighbours"}])
def test_what_reads_the_counted_graph_keeps_its_decay_and_its_layers(reads):
    points = [
        Point(graph="identity", **reads, **change).canonical()
        for change in ({}, {"decay": 0.9}, {"decay": 0.999}, {"layers": (0,)}, {"decay": 0.9, "layers": (0,)})
    ]
    assert len(set(points)) == 5
    assert (points[-1].decay, points[-1].layers) == (0.9, (0,))
    # What does not read the graph is one point at any decay.
    assert Point(graph="identity", router_gradient="dense", decay=0.9).canonical().decay == Point.decay


def test_a_study_of_decays_of_the_selection_runs_each(make_study):
    forms = ", ".join(f"{{graph: identity, selection: conditional, decay: {decay}}}" for decay in (0.9, 0.999))
    study = make_study(
        f"base: {{decay: 0.95}}\naxes: {{selection: [{forms}, {{graph: identity, selection: conditional}}]}}"
    )
    decays = [point.symphony(study.recipe.symphony).decay for point in study.points() if point.selection != "top_k"]
    assert decays == [0.9, 0.999, 0.95]


@pytest.mark.parametrize(
    "base", ["{router_gradient: dense}", "{damage: 0.1}", "{router_gradient: random, layers: [1]}"]
)
def test_a_base_with_more_than_a_graph_is_run_without_its_graph_too(make_study, base):
    study = make_study(f"systems: [smoe, xmoe]\nbase: {base}")
    points = study.points()
    for system in ("smoe", "xmoe"):
        point = dataclasses.replace(study.base, system=system)
        assert point.without_graph != point.plain
        assert {point.plain, point.without_graph, point.canonical()} <= set(points)
    assert len(points) == 8  # with the two controls


def test_a_recipe_that_chooses_one_expert_is_refused(make_study):
    config = make_study("").recipe.model.config
    with pytest.raises(ConfigError, match=r"num_experts_per_tok 1, so no two experts are chosen together.* take 2 or"):
        make_study("", **{"model.config": {**config, "num_experts_per_tok": 1}})


def test_plain_is_plain_by_any_name():
    for point in (Point(graph="identity", decay=0.5), Point(strength=0, normalization="symmetric")):
        assert point.is_plain
        assert point.canonical() == Point(graph="identity", strength=0.0)
    assert Point(graph="learned", decay=0.5).canonical() == Point(graph="learned")
    assert StudyRun(Point(), 1).name("abc") == "smoe-ema-seed1-abc"
