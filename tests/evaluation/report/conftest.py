"""Folders that the project's own commands wrote, small, and the page that compares them."""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import parsed`

import pytest
import torch
from matplotlib.figure import Figure
from small_runs import RECIPE, quickstart_settings, recipe_overrides

from symphony_hf.diagnostics import plots
from symphony_hf.evaluation.report.find_runs import read_runs
from symphony_hf.evaluation.report.page import write_page
from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness
from symphony_hf.evaluation.robustness.settings import RobustnessSettings
from symphony_hf.evaluation.routing.observe import observe_routing
from symphony_hf.evaluation.routing.settings import RoutingSettings
from symphony_hf.recipe import load_recipe
from symphony_hf.training.quickstart import run_quickstart
from symphony_hf.training.runner import run_recipe


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder that all of them are in, with a cache of its own."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMPHONY_HF_CACHE", str(folder / "cache"))
        yield folder


@contextlib.contextmanager
def drawing_quickly():
    """Drawing is half of the time that a run or a page takes here: each picture is one grey point."""

    def write(*arguments):
        Figure(figsize=(0.01, 0.01)).savefig(arguments[-1], format="png", dpi=100, facecolor="0.5")
        return arguments[-1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_graphs", "plot_expert_network", "plot_curves", "plot_comparison"):
            patch.setattr(plots, name, write)
        yield


@pytest.fixture
def quick_pictures():
    with drawing_quickly():
        yield


@pytest.fixture(scope="session")
def quickstart(home):
    (home / "quickstart").mkdir()
    with drawing_quickly():
        run_quickstart(quickstart_settings(home / "quickstart"))
    return home / "quickstart" / "out"


@pytest.fixture(scope="session")
def trained(home):
    """A training run with its graph."""
    (home / "trained").mkdir()
    overrides = recipe_overrides(home / "trained") | {"eval_strategy": "steps", "eval_steps": 2}
    with drawing_quickly():
        run_recipe(load_recipe(RECIPE, overrides), "symphony train <a recipe>")
    return home / "trained" / "run"


@pytest.fixture(scope="session")
def evaluated(home, quickstart):
    """The quickstart's copies against each other, in two attacks."""
    settings = RobustnessSettings(
        model=str(quickstart / "symphony"),
        against=str(quickstart / "plain"),
        data=str(home / "quickstart" / "text"),
        split="test",
        attacks=("aaa", "keyboard"),
        severities=(1, 3),
        seeds=(0,),
        block_size=32,
        output=str(home / "evaluated"),
    )
    evaluate_robustness(settings)
    return home / "evaluated"


@pytest.fixture(scope="session")
def routed(home, quickstart):
    """Routing diagnostics of the quickstart's model, with two of their pictures."""
    settings = RoutingSettings(
        model=str(quickstart / "symphony"),
        data=str(home / "quickstart" / "text"),
        split="test",
        severities=(1,),
        block_size=32,
        similarity_tokens=0,
        output=str(home / "routed"),
    )
    result = observe_routing(settings)
    with drawing_quickly():
        plots.plot_graphs({router: torch.eye(4) for router in result["routers"]}, home / "routed" / "graphs.png")
        plots.plot_graphs({router: torch.eye(4) for router in result["routers"]}, home / "routed" / "flips-aaa.png")
    return home / "routed"


@pytest.fixture(scope="session")
def folders(quickstart, trained, evaluated, routed):
    return [quickstart, trained, evaluated, routed]


@pytest.fixture(scope="session")
def page(home, folders):
    return write_page(read_runs(folders), home / "page" / "report.html")
