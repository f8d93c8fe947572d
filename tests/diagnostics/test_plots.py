"""The figures: their files, and what is in them."""

import importlib
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import symphony_hf.diagnostics
from symphony_hf.diagnostics.plots import copies, figure, heat_maps, networks
from symphony_hf.diagnostics.plots import curves as pages
from symphony_hf.diagnostics.plots import curves as runs
from symphony_hf.diagnostics.plots.copies import plot_copies
from symphony_hf.diagnostics.plots.curves import (
    draw_attack,
    draw_levels,
    draw_losses,
    plot_comparison,
    plot_curves,
)
from symphony_hf.diagnostics.plots.heat_maps import plot_graphs
from symphony_hf.diagnostics.plots.networks import plot_expert_network, plot_graph_evolution
from symphony_hf.errors import EvaluationError, GraphError
from symphony_hf.evaluation.statistics import Interval
from symphony_hf.routing.graph import count_coselections, initial_adjacency

pytestmark = pytest.mark.usefixtures("real_pictures")

GRAPH_PLOTS = [plot_graphs, plot_expert_network]


def random_graph(num_experts=8):
    logits = torch.randn(500, num_experts) + torch.randn(num_experts)
    return count_coselections(logits.topk(2).indices, num_experts) / 500


def layers(num_layers, num_experts=8):
    return {f"model.layers.{number}.mlp.gate": random_graph(num_experts) for number in range(num_layers)}


def interval(estimate):
    return Interval(estimate, 0.9 * estimate, 1.1 * estimate, 0.95, 60, 0)


CURVES = {
    "plain": {"train": [(10, 4.0), (20, 3.5)], "eval": [(20, 3.6)]},
    "symphony": {"train": [(10, 4.1), (20, 3.4)], "eval": []},
}
PERPLEXITIES = {
    "plain": {"clean": interval(30.0), "attacked": interval(40.0)},
    "symphony": {"clean": interval(29.0), "attacked": interval(38.0)},
}
RATIOS = {"symphony / plain, clean": interval(0.97), "symphony / plain, attacked": interval(0.95)}


@pytest.fixture
def drawn(monkeypatch):
    """The figure that a plot would have saved."""
    figures = []
    for module in (copies, heat_maps, networks, runs):
        monkeypatch.setattr(module, "save_png", lambda figure, path: figures.append(figure))
    return figures


def assert_picture(path, width, height):
    pixels = imread(path)
    assert pixels.shape[:2] == (height, width)
    assert pixels[..., :3].std() > 0.05
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_curves_are_drawn(tmp_path):
    path = tmp_path / "figures" / "curves.png"
    assert plot_curves(CURVES, path) == path
    assert_picture(path, 1200, 510)


def test_a_comparison_is_drawn(tmp_path):
    path = tmp_path / "comparison.png"
    assert plot_comparison(PERPLEXITIES, RATIOS, path) == path
    assert_picture(path, 1275, 540)


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "heat_map_size", "network_size"),
    [(1, 8, (615, 540), (840, 555)), (3, 16, (1020, 1005), (840, 990)), (5, 4, (1425, 1005), (1170, 990))],
)
def test_graphs_are_drawn(tmp_path, num_layers, num_experts, heat_map_size, network_size):
    graphs = layers(num_layers, num_experts)
    path = tmp_path / "graphs.png"
    assert plot_graphs(graphs, path) == path
    assert_picture(path, *heat_map_size)
    assert plot_expert_network(graphs, str(path)) == path
    assert_picture(path, *network_size)


@pytest.mark.parametrize("plot", GRAPH_PLOTS)
def test_graphs_before_training_are_drawn(tmp_path, plot):
    plot({"gate": initial_adjacency(4, 2)}, tmp_path / "start.png")
    assert imread(tmp_path / "start.png")[..., :3].std() > 0.05


@pytest.mark.parametrize("plot", GRAPH_PLOTS)
def test_an_error_leaves_the_old_file(tmp_path, plot):
    path = tmp_path / "graphs.png"
    path.write_bytes(b"old")
    with pytest.raises(GraphError, match="negative"):
        plot({"gate": -torch.ones(4, 4)}, path)
    with pytest.raises(GraphError, match="no graphs"):
        plot({}, path)
    assert path.read_bytes() == b"old"


def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail_half_way(self, target, **settings):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(CURVES, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]
    assert path.read_bytes() == b"old"


def test_layers_are_titled_by_what_differs_and_thinned_evenly():
    graph = random_graph()
    shown, left_out = figure.shown_layers({f"model.layers.{n}.mlp.gate": graph for n in (1, 3)})
    assert (list(shown), left_out) == (["layer 1", "layer 3"], "")
    shown, left_out = figure.shown_layers({f"{n}": graph for n in range(31)})
    assert list(shown) == [f"layer {n}" for n in range(0, 31, 2)]
    assert left_out == " (16 of 31 layers)"
    assert list(figure.shown_layers({"vision.gate": graph})[0]) == ["vision.gate"]
    assert list(figure.shown_layers({"vision.0": graph, "projector.0": graph})[0]) == ["vision", "projector"]
    assert list(figure.shown_layers({"gate": graph, "gate.inner": graph})[0]) == ["gate", "gate.inner"]


def test_the_heat_map_shows_row_shares_in_cluster_order(drawn):
    adjacency = random_graph(6)
    plot_graphs({"gate": adjacency}, "unused.png")
    bars, heat_map, _ = drawn[0].axes
    order = [int(label.get_text()) for label in heat_map.get_xticklabels()]
    assert sorted(order) == list(range(6))
    pairs = adjacency.numpy().copy()
    np.fill_diagonal(pairs, np.nan)
    shares = pairs / np.nansum(pairs, axis=1, keepdims=True)
    np.testing.assert_allclose(
        heat_map.images[0].get_array().filled(np.nan), shares[order][:, order], rtol=1e-5, equal_nan=True
    )
    loads = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(loads, np.diag(adjacency)[order] / np.trace(adjacency), rtol=1e-5)


def test_the_network_joins_the_experts_that_seek_each_other(drawn):
    adjacency = torch.full((6, 6), 0.02).fill_diagonal_(0.28)
    adjacency[[0, 4, 2, 5, 1, 3], [4, 0, 5, 2, 3, 1]] = 0.2
    plot_expert_network({"gate": adjacency}, "unused.png")
    (axes,) = drawn[0].axes
    # A label stands outside its expert, in the direction of it.
    places = {int(text.get_text()): np.array(text.get_position()) / 1.2 for text in axes.texts}
    joined = set()
    for line in axes.lines:
        ends = [min(places, key=lambda expert: np.linalg.norm(places[expert] - end)) for end in line.get_xydata()]
        joined.add(frozenset(ends))
    assert joined == {frozenset({0, 4}), frozenset({2, 5}), frozenset({1, 3})}


def test_an_even_network_says_that_no_pair_stands_out(drawn):
    plot_expert_network({"gate": torch.full((4, 4), 1 / 6).fill_diagonal_(0.5)}, "unused.png")
    (axes,) = drawn[0].axes
    assert not axes.lines
    assert axes.texts[-1].get_text() == "no pair stands out"


def test_curves_are_named_with_their_last_value(drawn):
    plot_curves(CURVES, "unused.png")
    train, evaluation = drawn[0].axes
    assert [line.get_label() for line in train.lines] == ["plain, last 3.500", "symphony, last 3.400"]
    assert [line.get_label() for line in evaluation.lines] == ["plain, last 3.600"]
    np.testing.assert_array_equal(train.lines[1].get_xydata(), CURVES["symphony"]["train"])


def test_one_pair_does_not_set_the_scale_of_all_networks(drawn):
    """Two experts that are hardly used but together: their lift is many times that of the others."""
    graphs = layers(3, 16)
    pairs = torch.cat([2 + torch.randn(495, 14).topk(2).indices, torch.tensor([[0, 1]] * 5)])
    rare = count_coselections(pairs, 16) / 500
    lifts = [lift for graph in graphs.values() for *_, lift in networks.strongest_edges(graph)]
    assert max(lift for *_, lift in networks.strongest_edges(rare)) > 5 * max(lifts)
    plot_expert_network(graphs | {"model.layers.3.mlp.gate": rare}, "unused.png")
    figure = drawn[0]
    widths = [[line.get_linewidth() for line in axes.lines] for axes in figure.axes]
    assert max(map(max, widths[:3])) > 0.7 * max(widths[3])  # with the pair's lift as the end, below 0.2
    assert figure.legends[0].get_texts()[2].get_text().endswith(" x expected or more")


def test_the_grey_diagonal_is_explained(drawn):
    plot_graphs({"gate": random_graph(6)}, "unused.png")
    assert "grey: the expert itself" in drawn[0].get_supxlabel()


def test_copies_have_panels_of_their_own_and_their_difference(drawn):
    base = {"train": [(10, 5.0), (20, 4.2)], "eval": [(20, 4.1)]}
    plot_copies(base, CURVES, "unused.png")
    (before, after, difference), (eval_before, eval_after, eval_difference) = np.reshape(drawn[0].axes, (2, 3))
    assert [line.get_label() for line in before.lines] == ["base, last 4.200"]
    assert [line.get_label() for line in after.lines] == ["plain, last 3.500", "symphony, last 3.400"]
    assert [len(axes.lines) for axes in (eval_before, eval_after)] == [1, 1]
    _, curve = difference.lines  # after the line at 0
    np.testing.assert_allclose(curve.get_xydata(), [(10, 0.1), (20, -0.1)])  # float64, up to rounding
    assert [axes.get_title() for axes in (before, after, difference)] == [
        "pre-training",
        "fine-tuning",
        "symphony minus plain",
    ]
    assert len(eval_difference.lines) == 1  # symphony was not evaluated


def test_copies_are_drawn_from_the_steps_of_both(drawn):
    copies = {"a": {"train": [(1, 2.0), (2, 1.5)]}, "b": {"train": [(2, 1.0), (3, 0.5)]}}
    plot_copies({}, copies, "unused.png")
    assert drawn[0].axes[2].lines[1].get_xydata().tolist() == [[2, -0.5]]


def test_a_comparison_shows_each_interval(drawn):
    plot_comparison(PERPLEXITIES, RATIOS, "unused.png")
    left, right = drawn[0].axes
    for container, by_text in zip(left.containers, PERPLEXITIES.values(), strict=True):
        points, _, (bars,) = container
        assert points.get_ydata().tolist() == [shown.estimate for shown in by_text.values()]
        ends = [segment[:, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [[shown.low, shown.high] for shown in by_text.values()])
    assert [label.get_text() for label in right.get_xticklabels()] == [
        "symphony / plain\nclean",
        "symphony / plain\nattacked",
    ]
    assert "95% intervals over 60 documents" in drawn[0].get_supxlabel()


def test_an_interval_without_width_is_drawn(drawn):
    """Rounding may leave the estimate a hair outside."""
    narrow = Interval(0.1 + 0.2, 0.3, 0.3, 0.95, 60, 0)
    plot_comparison({"plain": {"clean": narrow}}, {"a / b": narrow}, "unused.png")
    assert len(drawn) == 1


def test_levels_that_are_all_the_same_are_drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(pages, "as_svg", figures.append)
    draw_attack({"m": {0: (1.0, 1.0, 1.0), 1: (1.0, 1.0, 1.0)}}, "keyboard", "accuracy", (1.0, 1.0))
    assert figures[0].axes[0].get_ylim() == (0.5, 1.5)


def test_a_sparse_graph_has_a_scale_of_its_own_shares(drawn):
    group = torch.arange(240) // 3  # fewer than one pair in a hundred
    plot_graphs({"layer": (group.unsqueeze(1) == group).float()}, "unused.png")
    (heat_map,) = (axes.images[0] for axes in drawn[0].axes if axes.images)
    assert heat_map.get_clim()[1] == pytest.approx(1 / 2)


def test_an_evolution_needs_layers(tmp_path):
    with pytest.raises(GraphError, match="at least one moment"):
        plot_graph_evolution([{}], ["1"], tmp_path / "evolution.png")


def test_unknown_and_missing_series_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"plain.*`evals`.*`eval`"):
        plot_curves({"plain": {"evals": [(1, 2.0)]}}, tmp_path / "curves.png")
    with pytest.raises(EvaluationError, match="at least one"):
        plot_comparison(PERPLEXITIES, {}, tmp_path / "comparison.png")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fresh_import(monkeypatch):
    """Import a module of diagnostics anew, where another one cannot be imported."""
    monkeypatch.setattr(symphony_hf, "diagnostics", symphony_hf.diagnostics)  # so that it is put back afterwards
    for name in [name for name in sys.modules if name.startswith("symphony_hf.diagnostics")]:
        monkeypatch.delitem(sys.modules, name)

    def import_without(name, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        return importlib.import_module(name)

    return import_without


def test_the_numbers_do_without_matplotlib(fresh_import):
    graph_metrics = fresh_import("symphony_hf.diagnostics.graph_metrics", missing="matplotlib")
    assert graph_metrics.load_entropy(initial_adjacency(4, 2)) == pytest.approx(1)


def test_the_figures_do_without_pyplot(fresh_import, tmp_path):
    plots = fresh_import("symphony_hf.diagnostics.plots", missing="matplotlib.pyplot")
    assert plots.plot_curves(CURVES, tmp_path / "curves.png").exists()


LEVELS = {"a": {"clean": (30.0, 29.0, 31.0), "attacked": (40.0, None, None)}, "b": {"clean": (33.0, 31.0, 35.0)}}
SEVERITIES = {"a": {0: (30.0, 29.0, 31.0), 1: (33.0, 32.0, 34.0), 5: (60.0, 55.0, 65.0)}, "b": {5: (50.0, None, None)}}
PANELS = {
    "losses": lambda: draw_losses({"a": [(10, 4.0), (20, 3.5)], "b": [(10, 4.1)]}, "train"),
    "levels": lambda: draw_levels(LEVELS, "perplexity"),
    "shares": lambda: draw_levels({"a": {"clean": (0.5, None, None)}}, "accuracy", percent=True),
    "attack": lambda: draw_attack(SEVERITIES, "keyboard", "perplexity", (29.0, 65.0)),
}


@pytest.fixture
def panel(monkeypatch):
    """The axes of a panel that is drawn."""
    figures = []
    monkeypatch.setattr(pages, "as_svg", figures.append)

    def draw(name):
        PANELS[name]()
        (axes,) = figures.pop().axes
        return axes

    return draw


@pytest.mark.thorough
@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_an_svg_and_the_same_twice(name):
    content = PANELS[name]()
    root = ElementTree.fromstring(content)
    assert root.tag.endswith("}svg")
    assert content == PANELS[name]()
    links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)


def test_a_panel_of_levels_has_the_intervals_that_are_known(panel):
    axes = panel("levels")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    ends = [
        tuple(round(float(x), 6) for x, _ in segment) for bar in axes.containers for segment in bar[2][0].get_segments()
    ]
    assert sorted(ends) == [(29.0, 31.0), (31.0, 35.0), (40.0, 40.0)]


def test_a_panel_of_an_attack_begins_at_clean_text(panel):
    axes = panel("attack")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "1", "5"]
    assert axes.get_yscale() == "linear"
    low, high = axes.get_ylim()
    assert low < 29.0 < 65.0 < high


def test_values_far_apart_are_drawn_on_a_logarithmic_axis(monkeypatch):
    figures = []
    monkeypatch.setattr(pages, "as_svg", figures.append)
    draw_levels({"a": {"clean": (10.0, None, None)}, "b": {"clean": (5000.0, None, None)}}, "perplexity")
    draw_attack({"a": {0: (10.0, 9.0, 11.0), 1: (900.0, 800.0, 950.0)}}, "aaa", "perplexity", (9.0, 950.0))
    assert figures[0].axes[0].get_xscale() == "log"
    assert figures[1].axes[0].get_yscale() == "log"


def test_an_unknown_kind_of_loss_is_refused():
    with pytest.raises(EvaluationError, match="unknown curve `evall`; did you mean `eval`"):
        draw_losses({"a": [(1, 2.0)]}, "evall")


def test_names_are_drawn_letter_by_letter(monkeypatch):
    """matplotlib would take dollars for a formula, and leave a name with an underscore out of the legend."""
    figures = []
    monkeypatch.setattr(pages, "as_svg", figures.append)
    draw_losses({"_$\\bad$": [(1, 2.0)], "n" * 90: [(1, 2.0)]}, "train")
    hidden, long = (text.get_text() for text in figures[0].axes[0].get_legend().get_texts())
    assert hidden == " _\\$\\bad\\$, last 2.000"
    assert len(long) < 60
    assert "…" in long
