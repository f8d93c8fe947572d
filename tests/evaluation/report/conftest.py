"""Folders that the project's own commands wrote, small, and the page that compares them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import parsed`

import pytest
import torch
from pictures import without_graph_figures
from small_runs import RECIPE, recipe_overrides

from symphony_hf.diagnostics.plots.heat_maps import plot_graphs
from symphony_hf.evaluation.report.find_runs import read_runs
from symphony_hf.evaluation.report.page import write_page
from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness
from symphony_hf.evaluation.robustness.settings import RobustnessSettings
from symphony_hf.evaluation.routing.observe import observe_routing
from symphony_hf.evaluation.routing.settings import RoutingSettings
from symphony_hf.recipe import load_recipe
from symphony_hf.training.runner import run_recipe


@pytest.fixture(scope="session")
def quickstart(shared_runs):
    return shared_runs.quickstart()[0] / "out"


@pytest.fixture(scope="session")
def trained(shared_runs):
    """A training run with its graph."""

    def run(folder):
        overrides = recipe_overrides(folder) | {"eval_strategy": "steps", "eval_steps": 2}
        run_recipe(load_recipe(RECIPE, overrides), "symphony train <a recipe>")

    return shared_runs.make("trained", run)[0] / "run"


@pytest.fixture(scope="session")
def evaluated(shared_runs, quickstart):
    """The quickstart's copies against each other, in two attacks."""

    def run(folder):
        settings = RobustnessSettings(
            model=str(quickstart / "symphony"),
            against=str(quickstart / "plain"),
            data=str(quickstart.parent / "text"),
            split="test",
            attacks=("aaa", "keyboard"),
            severities=(1, 3),
            seeds=(0,),
            block_size=32,
            output=str(folder),
        )
        evaluate_robustness(settings)

    return shared_runs.make("evaluated", run)[0]


@pytest.fixture(scope="session")
def routed(shared_runs, quickstart):
    """Routing diagnostics of the quickstart's model, with two of their pictures."""

    def run(folder):
        settings = RoutingSettings(
            model=str(quickstart / "symphony"),
            data=str(quickstart.parent / "text"),
            split="test",
            severities=(1,),
            block_size=32,
            similarity_tokens=0,
            output=str(folder),
        )
        result = observe_routing(settings)
        for name in ("graphs", "flips-aaa"):
            plot_graphs({router: torch.eye(4) for router in result["routers"]}, folder / f"{name}.png")

    return shared_runs.make("routed", run)[0]


@pytest.fixture(scope="session")
def folders(quickstart, trained, evaluated, routed):
    return [quickstart, trained, evaluated, routed]


@pytest.fixture(scope="session")
def page(shared_runs, folders):
    with without_graph_figures():
        return shared_runs.make("page", lambda folder: write_page(read_runs(folders), folder / "report.html"))[1]


@pytest.fixture
def quick_pictures():
    with without_graph_figures():
        yield
