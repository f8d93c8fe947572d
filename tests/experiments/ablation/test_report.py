"""A study's report: intervals by hand, pairs by seed, and nothing hidden."""

import dataclasses
import math

import pytest

from symphony_hf.errors import ConfigError
from symphony_hf.experiments.ablation.cells import (
    Results,
    StudyRun,
    cells_of,
    chosen_rates,
    describe_plan,
    tuning_cells,
)
from symphony_hf.experiments.ablation.comparison import NO_VERDICT, title_of
from symphony_hf.experiments.ablation.page import markdown, print_ablation
from symphony_hf.experiments.ablation.report import write_ablation
from symphony_hf.experiments.ablation.run import run_ablation
from symphony_hf.experiments.ablation.text import prepare_streams

GRAPH = [[0.5, 0.25], [0.25, 0.5]]


def result(clean, attacked, kept, entropy=0.9):
    return {
        **{"validation": 90.0, "clean": clean, "attacked": attacked, "ratio": attacked / clean},
        **{"untouched_clean": clean, "untouched_attacked": attacked, "routing_kept": kept},
        **{"train_seconds": 1.0, "train_cpu_seconds": 1.0, "tokens_per_cpu_second": 1.0, "measure_seconds": 1.0},
        **{"load_entropy": entropy, "reached_tokens": 1, "stage": "judge", "learning_rate": 0.01},
        **{"tokens": 192, "curve": [(1, 5.0), (2, 4.0)], "parameters": 1, "test_tokens": 1, "attacked_tokens": 1},
        "machine": {"torch": "2", "cores": 2},
        "graphs": {"model.layers.0.moe.gate": GRAPH, "model.layers.1.moe.gate": GRAPH},
    }


def save_controls(study, results, seeds=3, worse=1.02):
    """Controls that are worse than 100, 110 and 120 by a factor that hardly depends on the seed."""
    for number, point in enumerate(point for point in study.points() if point.control != "none"):
        for seed in range(seeds):
            clean = (100 + 10 * seed) * worse * (1 + 0.001 * seed * (number + 1))
            results.save(StudyRun(point, seed), result(clean, 1.25 * clean, 0.8 - 0.001 * seed, 0.99 - 0.001 * seed))


def save_a_better_graph(results, plain, graph):
    for seed in range(3):
        results.save(StudyRun(plain, seed), result(100.0 + 10 * seed, 120.0, 0.9))
        results.save(StudyRun(graph, seed), result(90.0 + 9 * seed, 110.0, 0.9))


@pytest.fixture
def report(make_study, tmp_path):
    study = make_study("seeds: [0, 1, 2]\naxes: {decay: [0.9]}")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    plain, _, _, graph, decay = study.points()
    for seed, clean in enumerate((100.0, 110.0, 120.0)):
        results.save(StudyRun(plain, seed), result(clean, 1.2 * clean, 0.9))
        results.save(StudyRun(graph, seed), result(clean * math.exp(-0.01 * (seed + 1)), 1.1 * clean, 0.91))
    results.save(StudyRun(decay, 1), result(50.0, 60.0, 0.5))
    failed = {StudyRun(decay, 2): "exit code 1: it said nothing"}
    return write_ablation(study, results, failed)


def test_ratios_are_paired_by_seed_and_their_intervals_are_t(report):
    *_, graph, decay = report["rows"]
    # Logarithms -0.01, -0.02, -0.03: mean -0.02, standard error 0.01 / sqrt(3), t at 2 degrees of freedom 4.303.
    half = 4.302653 * 0.01 / math.sqrt(3)
    clean = graph["against_plain"]["clean"]
    assert clean["estimate"] == pytest.approx(math.exp(-0.02))
    assert clean["low"] == pytest.approx(math.exp(-0.02 - half), rel=1e-6)
    assert clean["high"] == pytest.approx(math.exp(-0.02 + half), rel=1e-6)
    assert clean["verdict"] == "not distinguishable"
    assert graph["against_plain"]["attacked"]["verdict"] == "better"
    assert graph["against_plain"]["routing_kept"]["estimate"] == pytest.approx(0.01)
    assert graph["clean"]["num_seeds"] == 3
    # One seed has a mean, and no interval and no verdict; it is set beside the same seed.
    assert decay["clean"]["low"] is None
    assert decay["against_plain"]["clean"]["estimate"] == pytest.approx(50 / 110)
    assert decay["against_plain"]["clean"]["verdict"] == "one seed"


def test_the_graph_is_set_beside_itself_with_its_experts_shuffled(make_study, tmp_path):
    study = make_study("seeds: [0, 1, 2]\naxes: {graph: [random]}")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    plain, _, _, graph, shuffled = study.points()
    for seed in range(3):
        results.save(StudyRun(plain, seed), result(100.0 + 10 * seed, 120.0, 0.90, 0.95))
        results.save(StudyRun(graph, seed), result(100.0, 120.0, 0.94 + 0.01 * seed, 0.85 + 0.001 * seed))
        results.save(StudyRun(shuffled, seed), result(100.0, 120.0, 0.93, 0.95))
    of_graph, of_shuffled = write_ablation(study, results, {})["rows"][3:]
    assert of_graph["against_plain"]["routing_kept"]["verdict"] == "better"
    # 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3): the interval has 0 in it.
    against = of_graph["against_shuffled"]["routing_kept"]
    assert against["estimate"] == pytest.approx(0.02)
    assert against["low"] == pytest.approx(0.02 - 4.302653 * 0.01 / math.sqrt(3), abs=1e-6)
    assert against["verdict"] == "not distinguishable"
    assert of_graph["against_plain"]["load_entropy"]["verdict"] == "lower"
    assert "against_shuffled" not in of_shuffled


def test_neighbours_are_set_beside_as_many_experts_at_random(make_study, tmp_path):
    gradients = ", ".join(f"{{graph: identity, router_gradient: {name}}}" for name in ("neighbours", "random"))
    study = make_study(f"seeds: [0, 1]\naxes: {{router_gradient: [{gradients}]}}")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    losses = {"neighbours": (90.0, 80.0), "random": (100.0, 100.0)}
    for point in study.points():
        for seed, loss in enumerate(losses.get(point.router_gradient, (110.0, 110.0))):
            if point.control == "none":
                results.save(StudyRun(point, seed), result(loss, 120.0, 0.9, 0.9))
    rows = {row["point"]["router_gradient"]: row for row in write_ablation(study, results, {})["rows"]}
    against = rows["neighbours"]["against_random"]["clean"]
    assert against["estimate"] == pytest.approx(math.sqrt(0.9 * 0.8))
    assert "against_random" not in rows["random"]
    assert "against itself with as many experts at random" in (tmp_path / "out" / "report.md").read_text()


def test_missing_and_failed_runs_are_reported(report, capsys):
    assert report["missing"] == ["smoe, decay 0.9, seed 0", "smoe, decay 0.9, seed 2"]
    page = markdown(report)
    assert "- smoe, decay 0.9, seed 0\n" in page
    assert "- smoe, decay 0.9, seed 2: exit code 1: it said nothing" in page
    assert "107.76" in page  # the mean of 99.00, 107.82 and 116.45
    print_ablation(report)
    assert "failed: smoe, decay 0.9, seed 2" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_files_are_there(real_pictures, report, tmp_path):
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"report.json", "report.md", "points.png", "curves.png", "graphs.png", "cells"}


def save_a_run(study, out):
    """The first run of a study, on its own text."""
    results = Results(out, study, prepare_streams(study, out).digest)
    results.save(cells_of(study)[0], result(100.0, 120.0, 0.9))


def test_a_report_alone_runs_nothing(make_study, tmp_path, capsys):
    study, out = make_study("seeds: [0]"), tmp_path / "out"
    save_a_run(study, out)
    report = run_ablation(study, out, report_only=True)
    assert (len(report["rows"]), len(report["missing"])) == (1, 3)
    assert len(list((out / "cells").iterdir())) == 1
    print_ablation(report)
    assert "Missing runs: 3 of 4\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"max_steps": 7}, {"eval.attack_rate": 0.2}], ids=["steps", "text"])
def test_a_report_with_other_settings_replaces_nothing(make_study, tmp_path, changes):
    study, out = make_study("seeds: [0]"), tmp_path / "out"
    save_a_run(study, out)
    run_ablation(study, out, report_only=True)
    before = (out / "report.json").read_bytes(), (out / "report.md").read_bytes()
    wanted = r"no judged run of this study in `.*out` is finished; .* of any study: 1\. .* `--set` that it was run with"
    with pytest.raises(ConfigError, match=wanted):
        run_ablation(make_study("seeds: [0]", **changes), out, report_only=True)
    assert before == ((out / "report.json").read_bytes(), (out / "report.md").read_bytes())


def test_a_report_of_tuning_alone_has_the_learning_rates(make_study, tmp_path):
    study, out = make_study("seeds: [0]\nlearning_rates: [0.1, 0.2]\ntuning_seeds: [8]"), tmp_path / "out"
    results = Results(out, study, prepare_streams(study, out).digest)
    wanted = r"no judged run of this study in `.*out` is finished, and none of its 8 runs that choose learning rates;"
    with pytest.raises(ConfigError, match=wanted):
        run_ablation(study, out, report_only=True)
    results.save(tuning_cells(study)[0], {**result(1.0, 1.0, 1.0), "validation_loss": 1.25})
    assert run_ablation(study, out, report_only=True)["rows"] == []
    page = (out / "report.md").read_text()
    assert "| smoe, no graph | 1.2500 |" in page[page.index("## Learning rates") :]


def test_runs_whose_learning_rate_is_not_chosen_are_missing_too(make_study, tmp_path, capsys):
    study = make_study("seeds: [0, 1]\nlearning_rates: [0.1, 0.2]\ntuning_seeds: [8]")
    results = Results(tmp_path / "out", study, "text")
    for cell in tuning_cells(study)[:3]:  # both rates of the first point, one of the second
        results.save(cell, {**result(1.0, 1.0, 1.0), "validation_loss": 1.0})
    print_ablation(write_ablation(study, results, {}))
    # 5 of 8 tuning runs and 2 judged runs of the first point; 3 points with 2 seeds wait for their rates.
    wanted = "Missing runs: 7 of 10, and 6 at learning rates that are not chosen yet\n"
    assert wanted in capsys.readouterr().out


def test_a_base_with_more_than_a_graph_is_compared_with_itself_without_it(make_study, tmp_path):
    """A dense gradient that gains 10%, and a graph beside it that costs 1%."""
    study = make_study("seeds: [0, 1, 2]\nbase: {router_gradient: dense}")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    plain, _, _, dense, graph = study.points()
    for seed in range(3):
        clean = 100.0 + 10 * seed
        results.save(StudyRun(plain, seed), result(clean, 120.0, 0.9))
        results.save(StudyRun(dense, seed), result(clean * (0.9 + 0.001 * seed), 120.0, 0.9))
        results.save(StudyRun(graph, seed), result(clean * (0.9 + 0.001 * seed) * (1.01 + 0.0001 * seed), 120.0, 0.9))
    report = write_ablation(study, results, {})
    row = report["rows"][-1]
    assert row["against_plain"]["clean"]["verdict"] == "better"
    assert row["against_no_graph"]["clean"]["verdict"] == "worse"
    page = markdown(report)
    assert "| clean against the plain system |" in page
    assert "compared with the plain system: it has no graph" in page
    assert "against no graph" not in page


def test_the_plain_system_of_a_contaminated_study_has_the_contamination_of_the_others(make_study, tmp_path):
    study = make_study("seeds: [0]\nbase: {router_gradient: dense}\ncontamination: 0.1")
    results = Results(tmp_path / "out", study, "text")
    for point in study.points():
        results.save(StudyRun(point, 0), result(100.0, 120.0, 0.9))
    page = markdown(write_ablation(study, results, {}))
    assert "has no damage added to its batches." in page
    assert "undamaged" not in page


def test_a_form_that_differs_by_its_graph_is_compared_with_no_graph(report):
    page = markdown(report)
    assert "| clean against no graph |" in page
    assert "plain system" not in page


def test_what_a_study_of_words_forgets_is_compared(make_study, tmp_path):
    study = make_study(f"seeds: [0, 1, 2]\npretraining: {{path: {tmp_path / 'text'}, max_steps: 3}}")
    results = Results(tmp_path / "out", study, "text")
    for number, point in enumerate(study.points()):
        for seed in range(3):
            forgotten = 4.0 + 0.1 * number + 0.001 * number * seed
            clean = 100.0 + 2 * number * (1 + 0.001 * seed)
            results.save(StudyRun(point, seed), {**result(clean, 120.0, 0.9), "forgotten_nats": forgotten})
    report = write_ablation(study, results, {})
    row = report["rows"][-1]
    # 0.3, 0.303 and 0.306: a difference of nats, and more of them are worse.
    assert row["against_plain"]["forgotten_nats"]["estimate"] == pytest.approx(0.303)
    assert row["against_plain"]["forgotten_nats"]["verdict"] == "worse"
    page = markdown(report)
    assert "| nats, first text |" in page
    assert "Of the first text, nats per word; comparisons are differences" in page


def test_the_size_of_the_vocabulary_is_that_of_the_text(make_study, tmp_path):
    study = make_study("seeds: [0]")
    results = Results(tmp_path / "out", study, "text")
    plain, frozen, *_ = study.points()
    results.save(StudyRun(plain, 0), result(100.0, 120.0, 0.9))  # a run of an earlier version does not have it
    assert write_ablation(study, results, {})["settings"]["text_vocab_size"] is None
    results.save(StudyRun(frozen, 0), {**result(100.0, 120.0, 0.9), "vocab_size": 43})
    settings = write_ablation(study, results, {})["settings"]
    assert (settings["text_vocab_size"], settings["vocab_size"]) == (43, 300)


def test_a_report_without_runs_lists_what_is_missing(make_study, tmp_path):
    study = make_study("")
    empty = write_ablation(study, Results(tmp_path / "out", study, "text"), {})
    assert empty["rows"] == []
    assert len(empty["missing"]) == len(cells_of(study)) == 12
    assert dataclasses.asdict(study.base) == empty["settings"]["base"]


def test_a_study_whose_controls_do_not_separate_prints_no_verdict(make_study, tmp_path, capsys):
    study = make_study("seeds: [0, 1, 2]")
    results = Results(tmp_path / "out", study, "text")
    plain, frozen, chosen, graph = study.points()
    for seed in range(3):
        results.save(StudyRun(plain, seed), result(100.0, 120.0, 0.9))
        results.save(StudyRun(frozen, seed), result(99.0 + seed, 120.0, 0.8))  # 99, 100, 101
        results.save(StudyRun(chosen, seed), result(110.0, 130.0 + seed, 1.0))
        results.save(StudyRun(graph, seed), result(101.0 + 0.01 * seed, 119.0 + 0.01 * seed, 0.95))
    report = write_ablation(study, results, {})
    compared = report["rows"][3]["against_plain"]
    assert compared["clean"]["low"] > 1  # the difference and its interval are there
    assert {values["verdict"] for values in compared.values()} == {NO_VERDICT}
    page = markdown(report)
    assert "**Nothing can be concluded**" in page
    print_ablation(report)
    for text in (page, capsys.readouterr().out):
        assert not any(word in text for word in ("better,", ", better", ", worse", "not distinguishable"))


def test_what_a_control_has_by_its_construction_shows_nothing(make_study, tmp_path):
    """Who chooses all experts keeps all of them under attack, whatever the study can see."""
    study = make_study("seeds: [0, 1, 2]")
    results = Results(tmp_path / "out", study, "text")
    plain, frozen, chosen, graph = study.points()
    for seed in range(3):
        results.save(StudyRun(plain, seed), result(100.0, 120.0, 0.9))
        results.save(StudyRun(frozen, seed), result(102.0 + 0.01 * seed, 122.0, 0.89 + 0.01 * seed))
        results.save(StudyRun(chosen, seed), result(110.0, 130.0, 1.0))
        results.save(StudyRun(graph, seed), result(101.0 + 0.01 * seed, 121.0, 0.95 + 0.001 * seed))
    report = write_ablation(study, results, {})
    assert report["sight"]["concludes"]
    assert "Freezing the routers at random multiplies the perplexity by 1.02" in markdown(report)
    assert report["sight"]["measures"]["clean"]["visible"]
    assert not report["sight"]["measures"]["routing_kept"]["visible"]
    compared = report["rows"][3]["against_plain"]
    assert [compared[name]["verdict"] for name in ("clean", "routing_kept")] == ["worse", NO_VERDICT]


def test_a_study_without_its_controls_prints_no_verdict(make_study, tmp_path):
    study = make_study("seeds: [0, 1]")
    results = Results(tmp_path / "out", study, "text")
    for point in (study.points()[0], study.points()[3]):
        for seed in range(2):
            results.save(StudyRun(point, seed), result(100.0 + (point.graph == "ema") + 0.001 * seed, 120.0, 0.9))
    report = write_ablation(study, results, {})
    assert report["rows"][1]["against_plain"]["clean"]["verdict"] == NO_VERDICT
    assert "the control with frozen routers has no run beside SMoE" in markdown(report)


def test_the_smallest_difference_is_that_of_the_forms_spread(report):
    # Only the graph has three seeds beside SMoE: logarithms -0.01, -0.02, -0.03 with deviation 0.01. At 2 degrees of
    # freedom, t is 4.302653 at 97.5% and 1.060660 at 80%.
    assert report["sight"]["measures"]["clean"]["smallest"] == pytest.approx(
        math.exp((4.302653 + 1.060660) * 0.01 / math.sqrt(3)), rel=1e-6
    )
    frozen = report["sight"]["measures"]["clean"]["frozen_routers"]
    assert frozen["estimate"] == pytest.approx(1.02 * (1 * 1.001 * 1.002) ** (1 / 3))
    assert report["sight"]["concludes"]


def test_each_form_is_compared_with_its_own_system(make_study, tmp_path):
    """A graph that is always 1% worse than its own GLaM, which differs from SMoE otherwise with each seed."""
    study = make_study("seeds: [0, 1, 2]\nsystems: [smoe, glam]")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    plain, _, _, graph, glam, glam_graph = study.points()
    for seed, of_glam in enumerate((1.0, 1.3, 0.8)):
        clean = 100.0 + 10 * seed
        results.save(StudyRun(plain, seed), result(clean, 120.0, 0.9))
        results.save(StudyRun(graph, seed), result(clean * math.exp(0.01 * seed), 120.0, 0.9))
        results.save(StudyRun(glam, seed), result(clean * of_glam, 120.0, 0.9))
        results.save(StudyRun(glam_graph, seed), result(clean * of_glam * 1.01, 120.0, 0.9))
    report = write_ablation(study, results, {})
    # Variances of the logarithms by form: 0.01^2 and 0, pooled.
    deviation = math.sqrt((0.01**2 + 0) / 2)
    pooled = math.exp((4.302653 + 1.060660) * deviation / math.sqrt(3))
    assert report["sight"]["measures"]["clean"]["smallest"] == pytest.approx(pooled, rel=1e-6)
    rows = {row["label"]: row["against_plain"]["clean"]["smallest"] for row in report["rows"] if "against_plain" in row}
    assert rows["glam, graph"] == pytest.approx(1.0)
    assert rows["smoe, graph"] == pytest.approx(math.exp(5.363313 * 0.01 / math.sqrt(3)), rel=1e-6)


def test_a_point_with_a_run_that_diverged_gets_no_other_verdict(make_study, tmp_path, capsys):
    study = make_study("seeds: [0, 1, 2]")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    plain, _, _, graph = study.points()
    save_a_better_graph(results, plain, graph)
    results.save(StudyRun(graph, 2), {"diverged": True, "stage": "judge", "machine": {}})
    report = write_ablation(study, results, {})
    assert (report["diverged"], report["missing"]) == (["smoe, graph, seed 2"], [])
    assert {values["verdict"] for values in report["rows"][3]["against_plain"].values()} == {"diverged"}
    assert "## Diverged\n\n- smoe, graph, seed 2" in markdown(report)
    print_ablation(report)
    assert "diverged: smoe, graph, seed 2" in capsys.readouterr().out


def test_a_control_that_diverged_shows_nothing(make_study, tmp_path):
    study = make_study("seeds: [0, 1, 2]")
    results = Results(tmp_path / "out", study, "text")
    save_controls(study, results)
    plain, frozen, _, graph = study.points()
    save_a_better_graph(results, plain, graph)
    assert write_ablation(study, results, {})["sight"]["concludes"]
    results.save(StudyRun(frozen, 2), {"diverged": True, "stage": "judge", "machine": {}})
    report = write_ablation(study, results, {})
    assert not report["sight"]["concludes"]
    assert "or one of them diverged" in markdown(report)


def test_titles_have_the_rate_as_it_is():
    assert title_of("damaged_nats_0.015") == "nats, 1.5% damaged"
    assert title_of("routing_kept_0.15") == "choices kept, 15% damaged"


def test_the_learning_rate_is_chosen_on_its_own_seeds_and_judged_once(make_study, tmp_path):
    study = make_study("seeds: [0]\nlearning_rates: [0.2, 0.3, 0.1]\ntuning_seeds: [8, 9]")
    results = Results(tmp_path / "out", study, "text")
    assert cells_of(study, chosen_rates(study, results)) == []  # nothing is judged before its rate is known
    losses = {(0.1, 8): 2.0, (0.1, 9): 2.2, (0.2, 8): 2.1, (0.2, 9): 1.9, (0.3, 8): 1.0, (0.3, 9): None}
    for cell in tuning_cells(study):
        results.save(cell, {**result(1.0, 1.0, 1.0), "validation_loss": losses[cell.rate, cell.seed]})
    # 0.3 diverged with one of the seeds; of the others, 0.2 has the lower mean.
    assert set(chosen_rates(study, results).values()) == {0.2}
    cells = cells_of(study, chosen_rates(study, results))
    assert {(cell.seed, cell.rate, cell.stage) for cell in cells} == {(0, 0.2, "judge")}
    page = markdown(write_ablation(study, results, {}))
    assert "Mean nats per word of held-out training text over seeds 8, 9" in page
    assert "| smoe, no graph | 2.1000 | 2.0000 | inf | 0.2 |" in page
    assert "may be better" not in page
    for cell in tuning_cells(study):
        results.save(cell, {**result(1.0, 1.0, 1.0), "validation_loss": -cell.rate})
    assert "0.3 is the highest rate tried: for the forms that chose it, a higher one may be better." in markdown(
        write_ablation(study, results, {})
    )


def test_a_form_that_diverges_at_every_learning_rate_is_listed_and_not_waited_for(make_study, tmp_path):
    study = make_study("seeds: [0]\nlearning_rates: [0.1, 0.2]\ntuning_seeds: [8]")
    results = Results(tmp_path / "out", study, "text")
    graph = study.points()[-1]
    for cell in tuning_cells(study):
        loss = None if cell.point == graph else 1.0
        results.save(cell, {**result(1.0, 1.0, 1.0), "validation_loss": loss})
    lines = describe_plan(study, results, seconds_per_cell=1.0, workers=1)
    assert "  diverged smoe, graph: at every learning rate" in lines
    assert not any("not chosen yet" in line for line in lines)
    report = write_ablation(study, results, {})
    assert report["diverged"] == ["smoe, graph: at every learning rate"]
    assert "## Diverged\n\n- smoe, graph: at every learning rate" in markdown(report)


@pytest.mark.parametrize("report", [None, '{"versions": {"symphony_hf": "1"}}'], ids=["none", "another command's"])
def test_the_report_of_another_command_is_not_replaced(make_study, tmp_path, report):
    study, out = make_study("seeds: [0]"), tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("another's")
    if report is not None:
        (out / "report.json").write_text(report)
    with pytest.raises(ConfigError, match=r"ablate: `.*out` has .*`report.md`, which no run of symphony_hf wrote with"):
        run_ablation(study, out, report_only=True)
    assert (out / "report.md").read_text() == "another's"
    (out / "report.md").unlink()
    (out / "report.json").unlink(missing_ok=True)
    save_a_run(study, out)
    for _ in range(2):  # its own report is replaced
        run_ablation(study, out, report_only=True)
