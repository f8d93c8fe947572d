"""A study's report: intervals by hand, pairs by seed, and nothing hidden."""

import dataclasses
import math

import pytest

from symphony_hf.experiments.ablation.cells import Results, StudyRun, cells_of
from symphony_hf.experiments.ablation.report import markdown, print_ablation, write_ablation
from symphony_hf.experiments.ablation.run import run_ablation

GRAPH = [[0.5, 0.25], [0.25, 0.5]]


def result(clean, attacked, kept, entropy=0.9):
    return {
        **{"validation": 90.0, "clean": clean, "attacked": attacked, "ratio": attacked / clean},
        **{"untouched_clean": clean, "untouched_attacked": attacked, "routing_kept": kept},
        **{"train_seconds": 1.0, "train_cpu_seconds": 1.0, "tokens_per_cpu_second": 1.0, "measure_seconds": 1.0},
        **{"load_entropy": entropy, "reached_tokens": 1},
        **{"tokens": 192, "curve": [(1, 5.0), (2, 4.0)], "parameters": 1, "test_tokens": 1, "attacked_tokens": 1},
        "machine": {"torch": "2", "cores": 2},
        "graphs": {"model.layers.0.moe.gate": GRAPH, "model.layers.1.moe.gate": GRAPH},
    }


@pytest.fixture
def report(make_study, tmp_path):
    study = make_study("seeds: [0, 1, 2]\naxes: {decay: [0.9]}")
    results = Results(tmp_path / "out", study, "text")
    plain, graph, decay = study.points()
    for seed, clean in enumerate((100.0, 110.0, 120.0)):
        results.save(StudyRun(plain, seed), result(clean, 1.2 * clean, 0.9))
        results.save(StudyRun(graph, seed), result(clean * math.exp(-0.01 * (seed + 1)), 1.1 * clean, 0.91))
    results.save(StudyRun(decay, 1), result(50.0, 60.0, 0.5))
    failed = {StudyRun(decay, 2): "exit code 1: it said nothing"}
    return write_ablation(study, results, failed)


def test_ratios_are_paired_by_seed_and_their_intervals_are_t(report):
    _, graph, decay = report["rows"]
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
    plain, graph, shuffled = study.points()
    for seed in range(3):
        results.save(StudyRun(plain, seed), result(100.0, 120.0, 0.90, 0.95))
        results.save(StudyRun(graph, seed), result(100.0, 120.0, 0.94 + 0.01 * seed, 0.85 + 0.001 * seed))
        results.save(StudyRun(shuffled, seed), result(100.0, 120.0, 0.93, 0.95))
    of_graph, of_shuffled = write_ablation(study, results, {})["rows"][1:]
    assert of_graph["against_plain"]["routing_kept"]["verdict"] == "better"
    # 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3): the interval has 0 in it.
    against = of_graph["against_shuffled"]["routing_kept"]
    assert against["estimate"] == pytest.approx(0.02)
    assert against["low"] == pytest.approx(0.02 - 4.302653 * 0.01 / math.sqrt(3), abs=1e-6)
    assert against["verdict"] == "not distinguishable"
    assert of_graph["against_plain"]["load_entropy"]["verdict"] == "lower"
    assert "against_shuffled" not in of_shuffled


def test_missing_and_failed_runs_are_reported(report, capsys):
    assert report["missing"] == ["smoe, decay 0.9, seed 0", "smoe, decay 0.9, seed 2"]
    page = markdown(report)
    assert "- smoe, decay 0.9, seed 0\n" in page
    assert "- smoe, decay 0.9, seed 2: exit code 1: it said nothing" in page
    assert "107.76" in page  # the mean of 99.00, 107.82 and 116.45
    print_ablation(report)
    assert "failed: smoe, decay 0.9, seed 2" in capsys.readouterr().out


def test_the_files_are_there(report, tmp_path):
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"report.json", "report.md", "points.png", "curves.png", "graphs.png", "cells"}


def test_a_report_alone_runs_nothing(make_study, tmp_path):
    report = run_ablation(make_study("seeds: [0]"), tmp_path / "out", report_only=True)
    assert (report["rows"], len(report["missing"])) == ([], 2)
    assert not (tmp_path / "out" / "cells").exists()


def test_a_report_without_runs_lists_what_is_missing(make_study, tmp_path):
    study = make_study("")
    empty = write_ablation(study, Results(tmp_path / "out", study, "text"), {})
    assert empty["rows"] == []
    assert len(empty["missing"]) == len(cells_of(study)) == 6
    assert dataclasses.asdict(study.base) == empty["settings"]["base"]
