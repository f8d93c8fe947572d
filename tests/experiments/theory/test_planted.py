"""The planted benchmark: its truth against sampling, its numbers against loops, and what must come out."""

import json
import math

import pytest
import torch

from symphony_hf.diagnostics import plots
from symphony_hf.diagnostics.plots.studies import plot_convergence
from symphony_hf.errors import ConfigError
from symphony_hf.experiments.theory import benchmark
from symphony_hf.experiments.theory.benchmark import (
    TheorySettings,
    distance,
    expected_distance,
    run_theory,
    suited_decay,
)
from symphony_hf.experiments.theory.planted import draw_tokens, plant, share_right
from symphony_hf.experiments.theory.report import theory_findings

pytestmark = pytest.mark.thorough

SMALL = {"num_experts": 8, "num_communities": 2, "batch": 32, "seeds": 3, "test_tokens": 4000}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("theory")
    settings = TheorySettings(output=str(output), updates=(8, 32, 128, 512), noises=(0.0, 0.4, 5.0), **SMALL)
    values = run_theory(settings)
    assert json.loads((output / "theory.json").read_text()).keys() == values.keys()
    assert {path.name for path in output.iterdir()} == {"theory.json", "convergence.png", "shares.png"}
    return values


def test_the_planted_probabilities_are_what_tokens_without_noise_choose():
    generator = torch.Generator().manual_seed(0)
    planted = plant(8, 2, 0.9, generator)
    assert torch.equal(planted.probabilities_EE, planted.probabilities_EE.T)
    assert float(planted.weights_P.sum()) == pytest.approx(1)
    assert float(planted.probabilities_EE.trace()) == pytest.approx(2)  # two experts a token
    logits, right = draw_tokens(planted, 40_000, 0.0, generator)
    seen = torch.zeros(8, 8)
    within = 0
    for token, pair in zip(logits.topk(2).indices.tolist(), right.tolist(), strict=True):
        assert sorted(token) == sorted(pair)
        within += (pair[0] < 4) == (pair[1] < 4)
        for j in token:
            for k in token:
                seen[j, k] += 1 / 40_000
    assert within / 40_000 == pytest.approx(0.9, abs=0.01)
    assert float((seen - planted.probabilities_EE).abs().max()) < 0.01
    assert distance(seen, planted) < 0.02
    assert distance(torch.zeros(8, 8), planted) == pytest.approx(1)


def test_the_share_counts_experts_not_places():
    chosen, right = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [3, 7], [6, 7]])
    assert share_right(chosen, right) == pytest.approx(3 / 6)


def test_the_suited_decay_leaves_a_root_of_the_start():
    for updates in (16, 1024):
        assert suited_decay(updates) ** updates == pytest.approx(updates**-0.5, rel=0.15)


def test_the_moving_average_converges_at_the_root_of_the_tokens(result):
    suited, fixed, noisy = result["convergence"]
    assert suited["tokens"] == [256, 1024, 4096, 16384]
    levels = [point["estimate"] for point in suited["distance"]]
    assert levels == sorted(levels, reverse=True)
    slope = math.log(levels[-1] / levels[0]) / math.log(64)
    assert -0.65 < slope < -0.3  # -1/2 up to a logarithm
    assert "expected" not in noisy
    for curve in (suited, fixed):
        for point, expected in zip(curve["distance"], curve["expected"], strict=True):
            assert point["estimate"] == pytest.approx(expected, rel=0.2)


def test_the_closed_form_is_the_mean_square_of_many_averages():
    generator = torch.Generator().manual_seed(0)
    planted = plant(4, 2, 0.8, generator)
    squares = []
    for _ in range(300):
        adjacency = torch.eye(4) * 0.5
        for _ in range(6):
            _, right = draw_tokens(planted, 8, 0.0, generator)
            counts = torch.zeros(4, 4)
            for pair in right.tolist():
                for j in pair:
                    for k in pair:
                        counts[j, k] += 1
            adjacency = 0.8 * adjacency + 0.2 * counts / 8
        squares.append(distance(adjacency, planted) ** 2)
    assert math.sqrt(sum(squares) / 300) == pytest.approx(expected_distance(planted, 8, 6, 0.8), rel=0.05)


def test_under_noise_the_graph_is_of_what_was_chosen_and_stays_away_from_the_truth(result):
    clean, some, much = (point["estimate"] for point in result["distance_under_noise"])
    assert clean < some < much


def test_shares_are_whole_without_noise_and_chance_under_much(result):
    for name, points in result["shares"].items():
        assert points[0]["estimate"] == pytest.approx(1.0, abs=1e-3), name
        assert points[2]["estimate"] == pytest.approx(2 / 8, abs=0.06), name
    assert result["gains"][1]["estimate"] == pytest.approx(
        result["shares"]["symphony"][1]["estimate"] - result["shares"]["smoe"][1]["estimate"]
    )


def test_the_findings_say_what_the_numbers_are(result):
    sentences = theory_findings(result)
    slope = result["convergence"][0]["slope"]
    assert f"{slope['estimate']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]" in sentences[0]
    won = [gain["noise"] for gain in result["gains"] if gain["low"] > 0]
    assert ("at noise " + (", ".join(f"{noise:g}" for noise in won) or "(none)") + ", and fewer") in sentences[-1]


def test_one_seed_has_no_interval(real_pictures, tmp_path):
    settings = TheorySettings(output=str(tmp_path), updates=(4, 8), noises=(0.1,), **{**SMALL, "seeds": 1})
    values = run_theory(settings)
    assert values["gains"][0]["low"] is None
    assert plot_convergence(values["convergence"], tmp_path / "again.png").is_file()
    assert len(theory_findings(values)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 6, "num_communities": 4}, "each needs at least two"),
        ({"num_experts": 16, "num_communities": 3}, "16 experts cannot be divided into 3"),
        ({"num_communities": 1}, "`within` must be 1; got 0.9"),
        ({"within": 0.0}, "`within`"),
        ({"noises": (-1.0,)}, "`noises`"),
        ({"updates": (5,)}, "`updates`"),
    ],
)
def test_what_cannot_be_planted_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TheorySettings(**settings)


def test_the_result_names_its_command(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(benchmark, "_measure", lambda settings: {"convergence": [], "shares": []})
    for name in ("plot_convergence", "plot_shares"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    for settings in ({}, {"seeds": 3, "num_experts": 8}, {"batch": 8}):
        said.append(run_theory(TheorySettings(output=str(tmp_path), **settings))["command"])
    function = "symphony_hf.experiments.theory.run_theory, see its settings"
    assert said == ["symphony theory", "symphony theory --seeds 3 --experts 8", function]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "_measure", lambda settings: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run_theory(TheorySettings(output=str(tmp_path / "file")))


def test_files_that_it_did_not_write_are_not_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "_measure", lambda settings: pytest.fail("it began"))
    (tmp_path / "shares.png").write_text("")
    with pytest.raises(ConfigError, match=r"theory: .* has `shares.png`, which no run of symphony_hf wrote"):
        run_theory(TheorySettings(output=str(tmp_path)))
