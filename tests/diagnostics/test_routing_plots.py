"""The figures of routing: their files, and what is in them."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from symphony_hf.diagnostics.graph_metrics import communities
from symphony_hf.diagnostics.plots import (
    attacks as changes,
)
from symphony_hf.diagnostics.plots import (
    attacks as robustness,
)
from symphony_hf.diagnostics.plots import (
    heat_maps as similarities,
)
from symphony_hf.diagnostics.plots import (
    loads,
    studies,
)
from symphony_hf.diagnostics.plots import (
    networks as evolution,
)
from symphony_hf.diagnostics.plots.attacks import plot_flips, plot_robustness, plot_saturation
from symphony_hf.diagnostics.plots.heat_maps import plot_similarity
from symphony_hf.diagnostics.plots.loads import plot_allocation, plot_load_history
from symphony_hf.diagnostics.plots.networks import plot_graph_evolution
from symphony_hf.diagnostics.plots.studies import plot_convergence, plot_shares
from symphony_hf.errors import EvaluationError, GraphError
from symphony_hf.routing.graph import count_coselections, initial_adjacency

pytestmark = pytest.mark.usefixtures("real_pictures")

LAYERS = [f"model.layers.{number}.mlp.gate" for number in range(3)]


def graph(num_experts=8):
    return count_coselections(torch.randn(300, num_experts).topk(2).indices, num_experts) / 300


def interval(estimate):
    return {
        "estimate": estimate,
        "low": 0.9 * estimate,
        "high": 1.2 * estimate,
        "confidence": 0.95,
        "num_documents": 12,
    }


def evaluation(attacks, roles=("model", "against"), level="perplexity", change="ratio"):
    rows = [
        {"attack": attack, "severity": severity, level: interval(30.0 + s), change: interval(1.0 + s / 30)}
        for attack in attacks
        for severity, s in ((1, 1), (3, 3), (None, 2))
    ]
    return {
        "measure": {"level": level, "change": change},
        "models": {role: {"clean": {level: interval(30.0)}, "attacks": rows} for role in roles},
        "documents": {"number": 12, "unit": "documents"},
        "settings": {"model": "runs/symphony", "against": "runs/plain"},
    }


HISTORY = {name: [[0.25] * 4, [0.5, 0.25, 0.25, 0.0]] for name in LAYERS}
ALLOCATION = {name: {"code": [1.0, 0.5, 0.5, 0.0], "news": [0.5] * 4} for name in LAYERS}
FLIPS = {
    "severity": (["1", "5"], dict(zip(LAYERS, ([0.1, 0.2], [0.2, 0.3], [0.3, 0.4]), strict=True))),
    "kind": (["word", "number", "space"], {name: [0.1, None, 0.2] for name in LAYERS}),
}
DRAWN = {
    "history": lambda path: plot_load_history(HISTORY, ["100", "200"], path),
    "allocation": lambda path: plot_allocation(ALLOCATION, dict.fromkeys(LAYERS, 2), path),
    "flips": lambda path: plot_flips(FLIPS, "Under attack", path),
    "saturation": lambda path: plot_saturation({n: [0.5, 1.0] for n in LAYERS}, ["a", "b"], path, 0.25),
    "evolution": lambda path: plot_graph_evolution([{n: graph() for n in LAYERS} for _ in range(2)], ["a", "b"], path),
    "similarity": lambda path: plot_similarity({n: torch.corrcoef(torch.randn(5, 9)) for n in LAYERS}, path),
    "robustness": lambda path: plot_robustness(evaluation(["aaa", "keyboard"]), path),
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that plots would have saved."""
    found = []
    for module in (changes, evolution, loads, robustness, similarities, studies):
        monkeypatch.setattr(module, "save_png", lambda figure, path: found.append(figure))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("name", DRAWN)
def test_they_are_drawn(name, tmp_path):
    path = tmp_path / "figures" / f"{name}.png"
    assert DRAWN[name](path) == path
    assert imread(path)[..., :3].std() > 0.05
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def images(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_a_history_shows_the_load_over_the_even_one_the_busiest_on_top(figures, tmp_path):
    plot_load_history({"gate": [[0.25] * 4, [0.0, 0.25, 0.25, 0.5]]}, ["1", "2"], tmp_path / "a.png")
    (image,) = images(figures[0])
    # Columns are moments: even, and then twice, as much, and nothing at all, by the logarithm to base 2.
    assert image.tolist() == [[0, 1], [0, 0], [0, 0], [0, -3]]
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["3", "1", "2", "0"]


def test_an_allocation_is_over_its_even_share(figures, tmp_path):
    plot_allocation({"gate": ALLOCATION[LAYERS[0]]}, {"gate": 2}, tmp_path / "a.png")
    assert images(figures[0])[0].tolist() == [[1, 0, 0, -3], [0, 0, 0, 0]]
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["code", "news"]


def test_flips_have_their_numbers_and_none_where_there_is_no_token(figures, tmp_path):
    plot_flips(FLIPS, "Under attack", tmp_path / "a.png")
    left, right = figures[0].axes[:2]
    assert [text.get_text() for text in left.texts] == ["10", "20", "20", "30", "30", "40"]
    assert [text.get_text() for text in right.texts] == ["10", "20"] * 3
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 0.4)
    assert np.isnan(right.images[0].get_array().filled(np.nan)[:, 1]).all()


def test_saturation_has_one_curve_per_layer(figures, tmp_path):
    plot_saturation({n: [0.5, 1.0] for n in LAYERS}, ["a", "b"], tmp_path / "a.png", chance=0.25)
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines[:3]] == ["layer 0", "layer 1", "layer 2"]
    assert list(lines[0].get_ydata()) == [0.5, 1.0]
    assert list(lines[3].get_ydata()) == [0.25, 0.25]


def test_experts_keep_their_place_and_the_colour_of_their_last_community(figures, tmp_path):
    moments = [{"gate": graph()} for _ in range(7)]
    plot_graph_evolution(moments, [str(n) for n in range(7)], tmp_path / "a.png")
    panels = [axes for axes in figures[0].axes if axes.collections]
    assert [axes.get_title() for axes in panels] == ["0", "2", "3", "4", "6"]  # 5 of 7, the last included
    places = [axes.collections[0].get_offsets() for axes in panels]
    assert all(np.array_equal(places[0], other) for other in places)
    colors = panels[-1].collections[0].get_facecolors()
    for group in communities(moments[-1]["gate"])[:6]:
        assert len({tuple(colors[expert]) for expert in group}) == 1


def test_graphs_before_training_evolve(tmp_path):
    start = {"gate": initial_adjacency(4, 2)}
    plot_graph_evolution([start, start], ["0", "1"], tmp_path / "a.png")
    assert imread(tmp_path / "a.png")[..., :3].std() > 0.02


def test_curves_begin_at_clean_text_and_leave_the_pooled_row_out(figures, tmp_path):
    plot_robustness(evaluation(["aaa", "b", "c", "d", "e"]), tmp_path / "a.png")
    shown = [axes for axes in figures[0].axes if axes.has_data()]
    assert len(shown) == 10  # two rows an attack, four attacks beside each other
    perplexity, ratio = figures[0].axes[0], figures[0].axes[4]
    for axes, values in ((perplexity, [30, 31, 33]), (ratio, [1 + 1 / 30, 1.1])):
        curves = [
            line for line in axes.lines if len(line.get_ydata()) == len(values) and line.get_linestyle() != "None"
        ]
        assert curves[0].get_ydata().tolist() == pytest.approx(values)
    assert perplexity.get_ylim() == figures[0].axes[1].get_ylim()


def test_curves_go_from_mild_to_severe_whatever_the_order_of_the_rows(figures, tmp_path):
    result = evaluation(["aaa"])
    result["models"]["model"]["attacks"].reverse()
    plot_robustness(result, tmp_path / "a.png")
    for line in figures[0].axes[0].lines:
        assert list(line.get_xdata()) == sorted(line.get_xdata())


def test_revisions_of_one_repository_are_told_apart(figures, tmp_path):
    result = evaluation(["aaa"])
    result["settings"] = {"model": "org/moe", "against": "org/moe", "revision": "new", "against_revision": "old"}
    plot_robustness(result, tmp_path / "a.png")
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["org/moe (model)", "org/moe (against)"]


def test_captions_name_what_is_drawn(figures, tmp_path):
    point = {"noise": 0.1, "estimate": 0.5, "low": 0.4, "high": 0.6}
    curve = {"name": "suited", "tokens": [16], "distance": [point], "expected": [0.5]}
    plot_shares({"smoe": [point]}, tmp_path / "a.png")
    plot_convergence([curve], tmp_path / "a.png")
    assert ["dotted: closed form" in figure.get_supxlabel() for figure in figures] == [False, True]


def test_accuracies_and_their_differences_are_drawn_likewise(figures, tmp_path):
    plot_robustness(evaluation(["fog"], level="accuracy", change="difference"), tmp_path / "a.png")
    accuracy, difference = figures[0].axes
    assert (accuracy.get_ylabel(), difference.get_ylabel()) == ("accuracy", "attacked - clean")
    assert any(list(line.get_ydata()) == [0, 0] for line in difference.lines)  # where an attack makes nothing of it


def test_tokens_that_differ_are_said(figures, tmp_path):
    for unit in ("token", "word"):
        result = evaluation(["aaa"])
        result["comparisons"] = {"unit": unit}
        plot_robustness(result, tmp_path / "a.png")
    notes = [figure.get_supxlabel() for figure in figures]
    assert [figure.axes[0].get_ylabel() for figure in figures] == ["perplexity per token"] * 2
    assert ["tokens differ, so these perplexities do not compare" in note for note in notes] == [False, True]
    assert all(note.startswith("bars: 95% intervals of each model over the same ") for note in notes)


def test_names_are_drawn_letter_by_letter(figures, tmp_path):
    names = ["_a$1$", "b$2$"]
    drawn = [" _a\\$1\\$", "b\\$2\\$"]
    plot_load_history({"gate": [[0.25] * 4] * 2}, names, tmp_path / "a.png")
    plot_allocation({"gate": {name: [0.5, 0.5] for name in names}}, {"gate": 1}, tmp_path / "a.png")
    plot_saturation({f"{name}.x": [0.5, 1.0] for name in names}, names, tmp_path / "a.png")
    plot_graph_evolution([{"gate": graph()}] * 2, names, tmp_path / "a.png")
    history, allocation, saturation, evolution = figures
    assert [label.get_text() for label in history.axes[0].get_xticklabels()] == drawn
    assert [label.get_text() for label in allocation.axes[0].get_yticklabels()] == drawn
    assert [label.get_text() for label in saturation.axes[0].get_xticklabels()] == drawn
    assert [text.get_text() for text in saturation.legends[0].texts] == drawn
    assert [axes.get_title() for axes in evolution.axes[:2]] == drawn


def test_one_model_alone_has_curves(figures, tmp_path):
    plot_robustness(evaluation(["aaa"], roles=("model",)), tmp_path / "a.png")
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["symphony"]


@pytest.mark.parametrize(
    ("plot", "error"),
    [
        (lambda path: plot_load_history({}, [], path), EvaluationError),
        (lambda path: plot_load_history(HISTORY, ["one"], path), EvaluationError),
        (lambda path: plot_allocation({}, {}, path), EvaluationError),
        (lambda path: plot_flips({"severity": ([], {})}, "", path), EvaluationError),
        (lambda path: plot_saturation({"gate": [1.0]}, ["a"], path), EvaluationError),
        (lambda path: plot_graph_evolution([], [], path), GraphError),
        (lambda path: plot_graph_evolution([{"a": graph()}, {"b": graph()}], ["1", "2"], path), GraphError),
        (lambda path: plot_similarity({}, path), EvaluationError),
        (lambda path: plot_robustness(evaluation([]), path), EvaluationError),
    ],
)
def test_nothing_to_draw_is_refused(plot, error, tmp_path):
    with pytest.raises(error):
        plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
